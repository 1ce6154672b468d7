"""Tests of chatreid_plugin.engine.sampler: the paper's distributions, and who may stand in a gallery.

Draws use fixed seeds. Chi-square statistics are compared with the 99.9 % quantile for their degrees of freedom: one of
a thousand right samplers would fail, and only once, when its seed is chosen.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.config import GallerySettings
from chatreid_plugin.engine.sampler import ImagePool, compute_match_probabilities, draw_gallery
from chatreid_plugin.errors import DataError
from chatreid_plugin.images import ImagePolicy


MakePool = Callable[..., ImagePool]

CHI_SQUARE_999 = {4: 18.47, 8: 26.12, 9: 27.88}
UNLIMITED = 10**9


def measure_chi_square(counts: Mapping[int, int], expected: Mapping[int, float]) -> float:
    """Return Pearson's statistic of counts under the expected probabilities."""
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    return sum((counts.get(key, 0) - total * share) ** 2 / (total * share) for key, share in expected.items())


def draw(pool: ImagePool, seed: int, smallest: int = 2, budget: int = UNLIMITED, **settings: Any) -> Any:
    return draw_gallery(pool, np.random.default_rng(seed), GallerySettings(**settings), budget, smallest)


def get_person(pool: ImagePool, image: int) -> str:
    return pool.records[image].person_id


def get_camera(pool: ImagePool, image: int) -> str:
    return pool.records[image].camera_id


@pytest.mark.parametrize(
    ("size", "smallest", "kind", "expected"),
    [
        # Equation 1 with N = 4: 1, 1/2, 1/3 over their sum, 11/6.
        (4, 2, "inverse", (6 / 11, 3 / 11, 2 / 11)),
        (4, 2, "uniform", (1 / 3, 1 / 3, 1 / 3)),
        (2, 2, "inverse", (1.0,)),
        # Stage 3 allows one match, as probable as two.
        (3, 1, "inverse", (2 / 5, 2 / 5, 1 / 5)),
        (4, 1, "uniform", (1 / 4,) * 4),
    ],
)
def test_probabilities_are_equation_1(size: int, smallest: int, kind: Any, expected: tuple[float, ...]) -> None:
    assert compute_match_probabilities(size, smallest, kind) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["inverse", "uniform"])
@pytest.mark.parametrize("smallest", [1, 2])
def test_probabilities_sum_to_one_for_every_size(kind: Any, smallest: int) -> None:
    for size in range(2, 27):
        probabilities = compute_match_probabilities(size, smallest, kind)
        assert len(probabilities) == size - smallest + 1
        assert sum(probabilities) == pytest.approx(1.0)


def test_gallery_sizes_are_uniform(make_pool: MakePool) -> None:
    pool = make_pool()
    counts = Counter(len(draw(pool, seed, min_size=2, max_size=10)[1]) for seed in range(3000))
    assert measure_chi_square(counts, dict.fromkeys(range(2, 11), 1 / 9)) < CHI_SQUARE_999[8]


@pytest.mark.parametrize(("smallest", "kind"), [(2, "inverse"), (2, "uniform"), (1, "inverse")])
def test_numbers_of_matches_follow_equation_1(make_pool: MakePool, smallest: int, kind: Any) -> None:
    # Twelve images of a person in other cameras, so that n is never cut to what there is.
    pool = make_pool(people=6, cameras=4, images=4)
    counts = Counter(
        len(draw(pool, seed, smallest, min_size=10, max_size=10, matches=kind)[2]) for seed in range(3000)
    )
    weights = {k: 1 / max(k - 1, 1) if kind == "inverse" else 1.0 for k in range(smallest, 11)}
    expected = {k: weight / sum(weights.values()) for k, weight in weights.items()}
    assert measure_chi_square(counts, expected) < CHI_SQUARE_999[10 - smallest]


def test_positions_of_the_matches_are_uniform(make_pool: MakePool) -> None:
    # Two cameras and one image in each: every gallery has one match.
    pool = make_pool(cameras=2, images=1)
    counts = Counter(draw(pool, seed, 1, min_size=5, max_size=5)[2][0] for seed in range(2000))
    assert measure_chi_square(counts, dict.fromkeys(range(5), 1 / 5)) < CHI_SQUARE_999[4]


@pytest.mark.parametrize("smallest", [1, 2])
def test_gallery_holds_cross_camera_matches_and_other_people_once_each(make_pool: MakePool, smallest: int) -> None:
    pool = make_pool(people=5, cameras=3, images=2)
    for seed in range(300):
        query, gallery, matches = draw(pool, seed, smallest, max_size=8, hard_negatives=0.5)
        assert len({query, *gallery}) == len(gallery) + 1
        assert len(matches) >= smallest
        for position, image in enumerate(gallery):
            same = get_person(pool, image) == get_person(pool, query)
            assert same == (position in matches)
            assert not same or get_camera(pool, image) != get_camera(pool, query)


def test_same_seed_gives_the_same_gallery(make_pool: MakePool) -> None:
    assert draw(make_pool(), 5) == draw(make_pool(), 5)
    assert draw(make_pool(), 5) != draw(make_pool(), 6)


def test_rare_matches_are_fewer_than_drawn_and_others_fill_the_gallery(make_pool: MakePool) -> None:
    pool = make_pool(people=20, cameras=2, images=1)
    for seed in range(50):
        _, gallery, matches = draw(pool, seed, min_size=6, max_size=6)
        assert (len(gallery), len(matches)) == (6, 1)


def test_query_has_as_many_positives_as_asked(make_pool: MakePool) -> None:
    records = make_pool(people=3, cameras=4, images=1).records
    # Person 0 is seen by four cameras, person 1 by two, person 2 by one.
    kept = [r for r in records if int(r.camera_id) < {"own:0": 4, "own:1": 2, "own:2": 1}[r.person_id]]
    pool = ImagePool(kept, ImagePolicy(2))
    rng = np.random.default_rng(0)
    for wanted, people in {1: {"own:0", "own:1"}, 2: {"own:0"}, 3: {"own:0"}, 9: {"own:0"}}.items():
        assert {get_person(pool, pool.draw_query(rng, wanted)) for _ in range(100)} == people


def test_budget_drops_negatives_first_and_keeps_the_matches(make_pool: MakePool) -> None:
    pool = make_pool(size=(192, 384))
    assert set(pool.tokens.tolist()) == {98}
    for seed in range(100):
        free = draw(pool, seed, min_size=10, max_size=10)
        query, gallery, matches = draw(pool, seed, min_size=10, max_size=10, budget=98 * 6 + 97)
        assert query == free[0]
        assert len(gallery) == 5
        assert len(matches) == min(5, len(free[2]))
        assert {gallery[i] for i in matches} <= {free[1][i] for i in free[2]}


def test_budget_counts_every_image_as_large_as_it_is(make_pool: MakePool) -> None:
    small, large = make_pool(people=10), make_pool(people=10, size=(192, 384))
    records = [(large if number % 3 else small).records[number] for number in range(len(small.records))]
    pool = ImagePool(records, ImagePolicy(2))
    for seed in range(100):
        query, gallery, _ = draw(pool, seed, max_size=10, budget=500)
        assert pool.tokens[[query, *gallery]].sum() <= 500


def test_too_small_budget_is_an_error_that_says_what_to_raise(make_pool: MakePool) -> None:
    with pytest.raises(DataError, match=r"195 visual tokens, but a query and one match take 196\. Raise cutoff_len"):
        draw(make_pool(size=(192, 384)), 0, budget=195)
    assert len(draw(make_pool(size=(192, 384)), 0, budget=196)[1]) == 1


def test_tokens_are_counted_under_the_stages_policy(make_pool: MakePool) -> None:
    assert make_pool(size=(64, 128), stage=1).tokens[0] == 45
    assert make_pool(size=(1000, 2000), stage=2).tokens[0] == 98


def test_hard_negatives_share_camera_and_colour_as_long_as_there_are_such(make_pool: MakePool) -> None:
    # Per camera: 3 images of each of 3 other people of the query's colour, and of 16 people of other colours.
    pool = make_pool(people=20, cameras=4, images=3, colours=5)
    colours = [record.attributes["upper_colour"] for record in pool.records]
    for query in (0, 100, 239):
        images = pool.draw_negatives(np.random.default_rng(query), query, 12, 1.0)
        assert len(set(images)) == 12
        assert all(get_camera(pool, image) == get_camera(pool, query) for image in images)
        assert sum(colours[image] == colours[query] for image in images) == 9
        assert get_person(pool, query) not in {get_person(pool, image) for image in images}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75])
def test_share_of_hard_negatives_is_the_one_asked_for(make_pool: MakePool, share: float) -> None:
    pool = make_pool(people=40, cameras=5, images=1, colours=10)
    colours = [record.attributes["upper_colour"] for record in pool.records]
    rng = np.random.default_rng(1)
    hard = total = 0
    for _ in range(2000):
        query = int(rng.integers(len(pool.records)))
        for image in pool.draw_negatives(rng, query, 2, share):
            total += 1
            hard += get_camera(pool, image) == get_camera(pool, query) and colours[image] == colours[query]
    # 3 of 195 other people's images are hard by chance; 4 standard deviations of a share over 4,000 draws.
    expected = share + (1 - share) * 3 / 195
    assert hard / total == pytest.approx(expected, abs=4 * (0.25 / total) ** 0.5)


def test_negatives_come_in_random_order(make_pool: MakePool) -> None:
    # The budget drops the last ones, which must not always be the easy ones.
    pool = make_pool()
    rng = np.random.default_rng(0)
    first = [get_camera(pool, pool.draw_negatives(rng, 0, 4, 0.5)[0]) for _ in range(400)]
    last = [get_camera(pool, pool.draw_negatives(rng, 0, 4, 0.5)[-1]) for _ in range(400)]
    assert abs(first.count("0") - last.count("0")) < 60


def test_negatives_are_all_there_are_when_few(make_pool: MakePool) -> None:
    pool = make_pool(people=2, cameras=2, images=30)
    records = [record for record in pool.records if record.person_id == "own:0"] + pool.records[60:62]
    pool = ImagePool(records, ImagePolicy(2))
    for share in (0.0, 0.5, 1.0):
        images = pool.draw_negatives(np.random.default_rng(0), 0, 5, share)
        assert sorted(images) == [60, 61]
        assert pool.draw_negatives(np.random.default_rng(0), 60, 3, share)[0] < 60


def test_unlike_people_differ_in_looks_and_captions(make_pool: MakePool) -> None:
    # Four people; 0 and 2 look the same, 1 and 3 too.
    pool = make_pool(people=4, cameras=2, images=1)
    records = [replace(r, attributes={"code": str(int(r.person_id[4:]) % 2)}) for r in pool.records]
    pool = ImagePool(records, ImagePolicy(2))
    everything = np.arange(len(records))
    assert {get_person(pool, i) for i in pool.draw_unlike(np.random.default_rng(0), 0, 9, everything)} == {
        "own:1",
        "own:3",
    }
    assert pool.has_unlike(everything)
    assert not pool.has_unlike(np.array([0, 1, 4, 5]))
    assert not pool.has_unlike(np.array([0, 1]))
    assert pool.draw_unlike(np.random.default_rng(0), 0, 1, np.array([0, 1, 4, 5])) == []


def test_people_with_the_same_caption_are_not_unlike(make_pool: MakePool) -> None:
    pool = make_pool(people=3, cameras=1, images=1, attributes={}, captions=("a man",))
    assert pool.draw_unlike(np.random.default_rng(0), 0, 2, np.arange(3)) == []
    # Without any description, every other person will do.
    pool = make_pool(people=3, cameras=1, images=1, attributes={}, captions=())
    assert sorted(pool.draw_unlike(np.random.default_rng(0), 0, 5, np.arange(3))) == [1, 2]
    assert pool.has_unlike(np.arange(3))

"""Tests of chatreid_plugin.engine.sampler: the paper's distributions, and who may stand in a gallery.

Draws use fixed seeds. Chi-square tests are at the 99.9 % level: one of a thousand right samplers would fail, and only
once, when its seed is chosen.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from chatreid_plugin.config import Change, GallerySettings
from chatreid_plugin.engine.sampler import (
    ImagePool,
    Queries,
    compute_size_probabilities,
    draw_gallery,
    draw_gallery_size,
    draw_sizes,
)
from chatreid_plugin.images import ImagePolicy
from chatreid_plugin.records import ImageRecord


MakePool = Callable[..., ImagePool]
MakeImages = Callable[..., list[ImageRecord]]
IndexImages = Callable[..., ImagePool]


def assert_follows(counts: Mapping[Any, int], shares: Mapping[Any, float]) -> None:
    """Compare counts with expected probabilities."""
    assert set(counts) <= set(shares)
    total = sum(counts.values())
    assert chisquare([counts.get(key, 0) for key in shares], [total * p for p in shares.values()]).pvalue > 0.001


def draw(pool: ImagePool, seed: int, smallest: int = 2, change: Change = "camera", **settings: Any) -> Any:
    return draw_gallery(pool, random.Random(seed), GallerySettings(**settings), smallest, change)


def get_label(pool: ImagePool, image: int, name: str) -> Any:
    return pool.table.get_column(name)[pool.first + image].as_py()


def get_person(pool: ImagePool, image: int) -> str:
    return get_label(pool, image, "person_id")


def get_camera(pool: ImagePool, image: int) -> str:
    return get_label(pool, image, "camera_id")


def get_colour(pool: ImagePool, image: int) -> str:
    return get_label(pool, image, "attributes")[0]["value"]


@pytest.mark.parametrize(
    ("size", "smallest", "law", "expected"),
    [
        # Equation 1 with N = 4: 1, 1/2, 1/3 over their sum, 11/6.
        (4, 2, "inverse", (6 / 11, 3 / 11, 2 / 11)),
        (4, 2, "uniform", (1 / 3, 1 / 3, 1 / 3)),
        (4, 2, "uniform_overall", (1 / 3, 1 / 3, 1 / 3)),
        (2, 2, "inverse", (1.0,)),
        # Stage 3 allows one match, as probable as two.
        (3, 1, "inverse", (2 / 5, 2 / 5, 1 / 5)),
        (4, 1, "uniform", (1 / 4,) * 4),
    ],
)
def test_matches_of_one_gallery_size(size: int, smallest: int, law: Any, expected: tuple[float, ...]) -> None:
    rows = compute_size_probabilities(size, size, smallest, law)
    assert rows[size][smallest:] == pytest.approx(expected)
    assert sum(sum(row) for row in rows) == pytest.approx(sum(rows[size][smallest:]))


@pytest.mark.parametrize("law", ["uniform_overall", "inverse", "uniform"])
@pytest.mark.parametrize("smallest", [1, 2])
@pytest.mark.parametrize(("least", "most"), [(2, 10), (5, 6), (2, 26), (8, 8)])
def test_sizes_and_matches_follow_their_law(law: Any, smallest: int, least: int, most: int) -> None:
    rng = random.Random(1)
    settings = GallerySettings(min_size=least, max_size=most, matches=law)
    counts = Counter(draw_sizes(rng, settings, smallest) for _ in range(20000))
    shares: dict[tuple[int, int], float] = {}
    for size in range(least, most + 1):
        for n in range(smallest, size + 1):
            if law == "uniform_overall":
                shares[size, n] = 1 / (most - smallest + 1) / (most - max(n, least) + 1)
            else:
                weights = {k: 1 / max(k - 1, 1) if law == "inverse" else 1.0 for k in range(smallest, size + 1)}
                shares[size, n] = weights[n] / sum(weights.values()) / (most - least + 1)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert_follows(counts, shares)


def test_every_number_of_matches_is_as_frequent_by_default() -> None:
    rng = random.Random(2)
    counts = Counter(draw_sizes(rng, GallerySettings(), 2)[1] for _ in range(20000))
    assert_follows(counts, dict.fromkeys(range(2, 11), 1 / 9))


@pytest.mark.parametrize(("least", "most"), [(2, 10), (5, 6), (2, 26)])
def test_gallery_sizes_are_uniform(least: int, most: int) -> None:
    rng = random.Random(0)
    settings = GallerySettings(min_size=least, max_size=most)
    counts = Counter(draw_gallery_size(rng, settings) for _ in range(20000))
    assert_follows(counts, dict.fromkeys(range(least, most + 1), 1 / (most - least + 1)))


@pytest.mark.parametrize("smallest", [1, 2])
def test_galleries_have_the_sizes_and_matches_that_are_drawn(make_pool: MakePool, smallest: int) -> None:
    # Twelve images of a person in other cameras, so that n is never cut to what there is.
    pool = make_pool(people=6, cameras=4, images=4)
    sizes: Counter[int] = Counter()
    numbers: Counter[int] = Counter()
    for seed in range(4000):
        _, matches, others = draw(pool, seed, smallest, min_size=2, max_size=10, matches="inverse")
        sizes[len(matches) + len(others)] += 1
        if len(matches) + len(others) == 10:
            numbers[len(matches)] += 1
    assert_follows(sizes, dict.fromkeys(range(2, 11), 1 / 9))
    weights = {k: 1 / max(k - 1, 1) for k in range(smallest, 11)}
    assert_follows(numbers, {k: weight / sum(weights.values()) for k, weight in weights.items()})


@pytest.mark.parametrize("smallest", [1, 2])
def test_gallery_holds_cross_camera_matches_and_other_people_once_each(make_pool: MakePool, smallest: int) -> None:
    pool = make_pool(people=5, cameras=3, images=2)
    for seed in range(300):
        query, matches, others = draw(pool, seed, smallest, max_size=8, hard_negatives=0.5)
        assert len({query, *matches, *others}) == len(matches) + len(others) + 1
        assert len(matches) >= smallest
        assert {get_person(pool, image) for image in matches} == {get_person(pool, query)}
        assert get_camera(pool, query) not in {get_camera(pool, image) for image in matches}
        assert get_person(pool, query) not in {get_person(pool, image) for image in others}


def test_cloth_changing_matches_wear_other_clothes_in_other_cameras(make_pool: MakePool) -> None:
    pool = make_pool(people=5, cameras=3, images=4, outfits=2)
    for seed in range(200):
        query, matches, _ = draw(pool, seed, 1, "clothes", max_size=8)
        assert get_camera(pool, query) not in {get_camera(pool, image) for image in matches}
        assert get_label(pool, query, "clothes_id") not in {get_label(pool, i, "clothes_id") for i in matches}


def test_images_of_unknown_clothes_take_no_part_in_cloth_changing(
    make_images: MakeImages, index_images: IndexImages
) -> None:
    records = make_images(people=4, cameras=2, images=2, outfits=2)
    records = [
        replace(r, clothes_id=None) if r.person_id == "own:0" or i % 4 == 1 else r for i, r in enumerate(records)
    ]
    pool = index_images(records, 3)
    for seed in range(200):
        query, matches, _ = draw(pool, seed, 1, "clothes", max_size=8)
        assert matches
        assert all(get_label(pool, image, "clothes_id") is not None for image in [query, *matches])


def test_matches_across_modalities_and_the_whole_gallery_are_of_the_other_one(make_pool: MakePool) -> None:
    pool = make_pool(people=5, cameras=4, images=2, infrared=2)
    seen: set[str] = set()
    for seed in range(200):
        query, matches, others = draw(pool, seed, 1, "modality", max_size=8)
        seen.add(get_label(pool, query, "modality"))
        assert matches
        shown = {get_label(pool, image, "modality") for image in [*matches, *others]}
        assert len(shown) == 1 and get_label(pool, query, "modality") not in shown
    assert seen == {"visible", "infrared"}


@pytest.mark.parametrize("change", ["camera", "clothes"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_other_galleries_are_of_the_querys_modality(
    make_images: MakeImages, index_images: IndexImages, change: Any, share: float
) -> None:
    # As in LLCM, every camera sees both: half of the images of each camera are infrared.
    records = make_images(people=6, cameras=3, images=4, outfits=2)
    pool = index_images([replace(r, modality="infrared") if i % 4 > 1 else r for i, r in enumerate(records)])
    for seed in range(100):
        query, matches, others = draw(pool, seed, 1, change, max_size=8, hard_negatives=share)
        assert matches
        assert len({get_label(pool, image, "modality") for image in [query, *matches, *others]}) == 1


@pytest.mark.parametrize("change", ["any", "camera", "clothes", "modality"])
def test_queries_count_the_matches_that_are_drawn(make_pool: MakePool, change: Any) -> None:
    pool = make_pool(people=4, cameras=4, images=3, outfits=3, infrared=2)
    counted = list(pool.queries[change].matches)
    assert counted == [len(pool.list_positives(image, change)) for image in range(pool.size)]
    assert pool.queries[change].most == max(counted) > 0


def test_same_seed_gives_the_same_gallery(make_pool: MakePool) -> None:
    assert draw(make_pool(), 5) == draw(make_pool(), 5)
    assert draw(make_pool(), 5) != draw(make_pool(), 6)


def test_rare_matches_are_fewer_than_drawn_and_others_fill_the_gallery(make_pool: MakePool) -> None:
    pool = make_pool(people=20, cameras=2, images=1)
    for seed in range(50):
        _, matches, others = draw(pool, seed, min_size=6, max_size=6)
        assert (len(matches), len(others)) == (1, 5)


def test_query_has_as_many_positives_as_asked(make_images: MakeImages, index_images: IndexImages) -> None:
    # Person 0 is seen by four cameras, person 1 by two, person 2 by one.
    seen_by = {"own:0": 4, "own:1": 2, "own:2": 1}
    records = make_images(people=3, cameras=4, images=1)
    pool = index_images([r for r in records if int(r.camera_id) < seen_by[r.person_id]])
    rng = random.Random(0)
    for wanted, people in {1: {"own:0", "own:1"}, 2: {"own:0"}, 3: {"own:0"}, 9: {"own:0"}}.items():
        assert {get_person(pool, pool.queries["camera"].draw(rng, wanted)) for _ in range(100)} == people


def test_every_query_with_enough_matches_is_as_likely() -> None:
    queries = Queries(np.array([0, 3, 1, 2, 3, 0]))
    rng = random.Random(2)
    for wanted, rows in {1: [1, 2, 3, 4], 2: [1, 3, 4], 3: [1, 4], 7: [1, 4]}.items():
        counts = Counter(queries.draw(rng, wanted) for _ in range(4000))
        assert_follows(counts, dict.fromkeys(rows, 1 / len(rows)))


def test_tokens_are_counted_under_the_stages_policy(make_pool: MakePool) -> None:
    assert make_pool(size=(64, 128), stage=1).tokens[0] == 45
    assert make_pool(size=(1000, 2000), stage=2).tokens[0] == 98


def test_pool_of_another_stage_shares_the_index_and_counts_anew(make_pool: MakePool) -> None:
    pool = make_pool(size=(64, 128), stage=2)
    other = pool.count_under(ImagePolicy(1))
    assert (pool.tokens[0], other.tokens[0]) == (10, 45)
    assert other.people is pool.people


def test_hard_negatives_have_a_matchs_camera_and_the_querys_colour_as_long_as_there_are_such(
    make_pool: MakePool,
) -> None:
    # Per camera: 3 images of each of 3 other people of the query's colour, and of 16 people of other colours.
    pool = make_pool(people=20, cameras=4, images=3, colours=5)
    colours = [get_colour(pool, image) for image in range(pool.size)]
    for query in (0, 100, 239):
        positives = pool.list_positives(query)[:3]
        (camera,) = {get_camera(pool, image) for image in positives}
        images = pool.draw_negatives(random.Random(query), query, 12, 1.0, positives)
        assert len(set(images)) == 12
        assert {get_camera(pool, image) for image in images} == {camera}
        assert sum(colours[image] == colours[query] for image in images) == 9
        assert get_person(pool, query) not in {get_person(pool, image) for image in images}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75])
def test_share_of_hard_negatives_is_the_one_asked_for(make_pool: MakePool, share: float) -> None:
    pool = make_pool(people=40, cameras=5, images=1, colours=10)
    colours = [get_colour(pool, image) for image in range(pool.size)]
    rng = random.Random(1)
    hard = total = 0
    for _ in range(2000):
        query = rng.randrange(pool.size)
        for image in pool.draw_negatives(rng, query, 2, share, pool.list_positives(query)):
            total += 1
            hard += colours[image] == colours[query]
    # 3 of 39 other people of a camera are hard by chance; 4 standard deviations of a share over 4,000 draws.
    expected = share + (1 - share) * 3 / 39
    assert hard / total == pytest.approx(expected, abs=4 * (0.25 / total) ** 0.5)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_hard_negatives_by_features_are_the_most_similar_of_the_matchs_camera_at_the_share(
    make_pool: MakePool, share: float
) -> None:
    # Of a camera's 59 other people the look-alikes of person p are those after it, on a circle; colours say otherwise.
    circle = np.arange(60) * np.pi / 30
    features = np.repeat(np.stack([np.cos(circle), np.sin(circle)], axis=1), 5, axis=0)
    pool = make_pool(people=60, cameras=5, images=1, colours=10, features=features)
    rng = random.Random(1)
    hard = total = 0
    for _ in range(2000):
        query = rng.randrange(pool.size)
        positives = pool.list_positives(query)
        (image,) = pool.draw_negatives(rng, query, 1, share, positives)
        away = abs(image // 5 - query // 5)
        # Ten are near: five on either side.
        hard += min(away, 60 - away) <= 5
        total += 1
        assert get_camera(pool, image) in {get_camera(pool, i) for i in positives}
    expected = share + (1 - share) * 10 / 59
    assert hard / total == pytest.approx(expected, abs=4 * (0.25 / total) ** 0.5)


def test_hard_negatives_by_features_are_filled_up_where_the_look_alikes_are_used_up(make_pool: MakePool) -> None:
    pool = make_pool(people=20, cameras=2, images=1, features=np.ones((40, 2)))
    images = pool.draw_negatives(random.Random(0), 0, 15, 1.0, pool.list_positives(0))
    assert len(set(images)) == 15 and {get_camera(pool, image) for image in images} == {"1"}
    # All are alike: the first ten of them look alike, the others come by chance.
    assert {image // 2 for image in images} >= set(range(1, 11))


def test_hard_negatives_by_features_resemble_the_match_across_modalities(make_pool: MakePool) -> None:
    # Visible and infrared images of a person are unlike; the infrared ones of people 0 to 10 are like each other.
    features = np.array([[[1, p, 0], [0, p > 10, 1]] for p in range(30)], dtype=np.float32)
    pool = make_pool(people=30, cameras=2, images=1, infrared=1, features=features.reshape(60, 3))
    images = pool.draw_negatives(random.Random(0), 0, 10, 1.0, pool.list_positives(0, "modality"))
    assert sorted(images) == [2 * person + 1 for person in range(1, 11)]


def measure_information(pairs: Counter[tuple[Any, bool]]) -> float:
    """Return the mutual information of the two in bits."""
    total = pairs.total()
    firsts: Counter[Any] = Counter()
    seconds: Counter[bool] = Counter()
    for (first, second), count in pairs.items():
        firsts[first] += count
        seconds[second] += count
    return sum(
        count / total * np.log2(count * total / firsts[first] / seconds[second])
        for (first, second), count in pairs.items()
    )


@pytest.mark.parametrize("change", ["any", "camera", "clothes", "modality"])
@pytest.mark.parametrize(("share", "by_features"), [(0.0, False), (1.0, False), (1.0, True)])
def test_cameras_do_not_tell_the_answer(
    make_images: MakeImages, index_images: IndexImages, change: Change, share: float, by_features: bool
) -> None:
    # Camera 0 is everywhere, cameras 2 and 3 see few people, as in real sets.
    records = make_images(people=30, cameras=4, images=4, outfits=2, infrared=1)
    records = [r for r in records if r.camera_id in "01" or int(r.person_id[4:]) % int(r.camera_id) == 0]
    # Features that look like their camera more than like anybody.
    rng = np.random.default_rng(0)
    features = np.array([np.eye(4)[int(r.camera_id)] * 3 + rng.standard_normal(4) for r in records])
    pool = index_images(records, features=features if by_features else None)
    rng = random.Random(3)
    same: Counter[tuple[Any, bool]] = Counter()
    cameras: Counter[tuple[Any, bool]] = Counter()
    for _ in range(6000):
        query = pool.queries[change].draw(rng, 1)
        positives = pool.list_positives(query, change)
        match = rng.random() < 0.5
        other = rng.choice(positives) if match else pool.draw_negatives(rng, query, 1, share, positives)[0]
        own, shown = get_camera(pool, query), get_camera(pool, other)
        same[own == shown, match] += 1
        cameras[(own, shown), match] += 1
    # Of independent values about (values - 1) / (2 n ln 2) bits are found: 0.001 for twelve pairs of cameras.
    assert measure_information(same) < 0.001
    assert measure_information(cameras) < 0.003


def test_negatives_come_in_random_order(make_pool: MakePool) -> None:
    # The budget drops the last ones, which must not always be the easy ones.
    pool = make_pool()
    rng = random.Random(0)
    colour = get_colour(pool, 0)
    positives = pool.list_positives(0)
    first = [get_colour(pool, pool.draw_negatives(rng, 0, 4, 0.5, positives)[0]) for _ in range(400)]
    last = [get_colour(pool, pool.draw_negatives(rng, 0, 4, 0.5, positives)[-1]) for _ in range(400)]
    assert abs(first.count(colour) - last.count(colour)) < 60


def test_negatives_are_all_there_are_when_few(make_images: MakeImages, index_images: IndexImages) -> None:
    records = make_images(people=2, cameras=2, images=30)
    # Of the other person only two images of the first camera, which is the query's.
    pool = index_images([record for record in records if record.person_id == "own:0"] + records[60:62])
    for share in (0.0, 0.5, 1.0):
        images = pool.draw_negatives(random.Random(0), 0, 5, share, pool.list_positives(0))
        assert sorted(images) == [60, 61]


def test_another_camera_than_the_querys_comes_first_where_the_matches_camera_shows_nobody_else(
    make_images: MakeImages, index_images: IndexImages
) -> None:
    records = make_images(people=9, cameras=3, images=2)
    pool = index_images([r for r in records if r.person_id == "own:0" or r.camera_id != "1"])
    query, positives = 0, [2, 3]
    assert {get_camera(pool, image) for image in positives} == {"1"}
    images = pool.draw_negatives(random.Random(0), query, 20, 0.5, positives)
    assert [get_camera(pool, image) for image in images].count("2") == 16
    assert [get_camera(pool, image) for image in images].count("0") == 4


def test_negatives_across_modalities_resemble_the_match(make_pool: MakePool) -> None:
    pool = make_pool(people=20, cameras=4, images=3, infrared=2)
    query, like = 0, 9
    assert get_person(pool, like) == get_person(pool, query)
    images = pool.draw_negatives(random.Random(0), query, 8, 1.0, [like])
    assert {get_camera(pool, image) for image in images} == {get_camera(pool, like)}
    images = pool.draw_negatives(random.Random(0), query, 8, 0.0, [like])
    assert {get_label(pool, image, "modality") for image in images} == {"infrared"}


def test_unlike_people_differ_in_looks_and_captions(make_images: MakeImages, index_images: IndexImages) -> None:
    # Four people; 0 and 2 look the same, 1 and 3 too.
    records = make_images(people=4, cameras=2, images=1)
    pool = index_images([replace(r, attributes={"code": str(int(r.person_id[4:]) % 2)}) for r in records])
    unlike = pool.draw_unlike(random.Random(0), 0, 9, pool.everything)
    assert {get_person(pool, image) for image in unlike} == {"own:1", "own:3"}
    assert pool.has_unlike(pool.everything)
    assert not pool.has_unlike([0, 1, 4, 5])
    assert not pool.has_unlike([0, 1])
    assert pool.draw_unlike(random.Random(0), 0, 1, [0, 1, 4, 5]) == []


def test_people_with_the_same_caption_are_not_unlike(make_pool: MakePool) -> None:
    pool = make_pool(people=3, cameras=1, images=1, attributes={}, captions=("a man",))
    assert pool.draw_unlike(random.Random(0), 0, 2, [0, 1, 2]) == []
    # Without any description, every other person will do.
    pool = make_pool(people=3, cameras=1, images=1, attributes={}, captions=())
    assert sorted(pool.draw_unlike(random.Random(0), 0, 5, [0, 1, 2])) == [1, 2]
    assert pool.has_unlike([0, 1, 2])


def test_same_attributes_in_another_order_are_the_same_looks(
    make_images: MakeImages, index_images: IndexImages
) -> None:
    records = make_images(people=2, cameras=1, images=1, captions=())
    looks = [{"hat": "cap", "bag": "none"}, {"bag": "none", "hat": "cap"}]
    pool = index_images([replace(record, attributes=look) for record, look in zip(records, looks, strict=True)])
    assert not pool.is_unlike(0, 1)


def test_owners_of_an_attribute_are_all_images_that_have_it(make_pool: MakePool) -> None:
    pool = make_pool(people=4, cameras=1, images=2, colours=2)
    for image in range(pool.size):
        colour, code = pool.list_attributes(image)
        assert [get_colour(pool, owner) for owner in pool.list_owners(colour)] == [get_colour(pool, image)] * 4
        assert {get_person(pool, owner) for owner in pool.list_owners(code)} == {get_person(pool, image)}

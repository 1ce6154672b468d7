"""Tests of chatreid_plugin.eval.tied: equal to every draw and tie order enumerated, and to published rules."""

from itertools import permutations, product

import numpy as np
import pytest

from chatreid_plugin.errors import DataError
from chatreid_plugin.eval.metrics import evaluate_ranking
from chatreid_plugin.eval.tied import Cmc, Ties


TOPK = (1, 2, 3, 9)
PERSONS = [1, 2, 1, 3, 2, 4]


def average_over_orders(scores: list[int], cmc: Cmc) -> list[float]:
    """Rank every permutation, and every draw of one image per identity, of a query of identity 1."""
    groups = [[i for i, person in enumerate(PERSONS) if person == wanted] for wanted in sorted(set(PERSONS))]
    draws = [range(len(PERSONS))] if cmc == "unique_identity" else list(product(*groups))
    ranks = []
    for order in permutations(range(len(PERSONS))):
        ranked = sorted(order, key=lambda item: -scores[item])
        for draw in draws:
            people = list(dict.fromkeys(PERSONS[item] for item in ranked if item in draw))
            ranks.append(people.index(1))
    return [float(np.mean([rank < k for rank in ranks])) for k in TOPK]


@pytest.mark.parametrize("cmc", ["unique_identity", "single_gallery_shot"])
@pytest.mark.parametrize("scores", [[1] * 6, [1, 1, 2, 2, 2, 0], [3, 3, 1, 2, 3, 3], [1, 6, 2, 3, 4, 5]])
def test_equals_every_order_and_draw_enumerated(scores: list[int], cmc: Cmc) -> None:
    found = evaluate_ranking([scores], [1], PERSONS, cmc=cmc, topk=TOPK)
    assert list(found.cmc.values()) == pytest.approx(average_over_orders(scores, cmc), abs=1e-12)


@pytest.mark.parametrize("cmc", ["unique_identity", "single_gallery_shot"])
def test_positive_after_the_retrieved_items_is_a_miss_when_cmc_is_over_identities(cmc: Cmc) -> None:
    row, people = [[3.0, 2.0, 1.0]], [2, 1, 1]
    found = [evaluate_ranking(row, [1], people, cmc=cmc, topk=(1, 2), retrieved=[n]).cmc[2] for n in (1, 2, 3)]
    assert found == ([0.0, 1.0, 1.0] if cmc == "unique_identity" else [0.0, 0.5, 1.0])


@pytest.mark.parametrize("ties", ["expected", "index", "optimistic", "pessimistic"])
@pytest.mark.parametrize("cmc", ["unique_identity", "single_gallery_shot"])
def test_refuses_a_cut_through_equal_scores_when_cmc_is_over_identities(cmc: Cmc, ties: Ties) -> None:
    row, people = [[5.0, *[1.0] * 10, 0.0]], [2, *range(1, 11), 1]
    with pytest.raises(DataError, match=f'Query 0: retrieved=2 cuts through equal scores, for which cmc="{cmc}"'):
        evaluate_ranking(row, [1], people, cmc=cmc, ties=ties, retrieved=[2])
    for retrieved, share in ((1, 0.0), (11, 1.0 if cmc == "unique_identity" else 0.5)):
        found = evaluate_ranking(row, [1], people, cmc=cmc, ties=ties, retrieved=[retrieved], topk=[11])
        assert found.cmc[11] == pytest.approx(share)
    # Standard CMC is exact there: one of ten tied items was returned.
    assert evaluate_ranking(row, [1], people, retrieved=[2], topk=[5]).cmc[5] == pytest.approx(0.1)


@pytest.mark.parametrize("cmc", ["unique_identity", "single_gallery_shot"])
def test_is_the_average_over_shuffled_orders_when_identities_have_many_tied_images(cmc: Cmc) -> None:
    generator = np.random.default_rng(0)
    people = np.array([1] * 3 + [2] * 5 + [3] * 2 + [4] * 9 + list(range(5, 20)))
    tied = np.zeros(len(people))
    expected = evaluate_ranking([tied], [1], people, cmc=cmc, topk=TOPK).cmc
    shuffled: list[list[float]] = []
    for order in (generator.permutation(len(people)) for _ in range(2000)):
        ranked = people[order]
        if cmc == "single_gallery_shot":  # one image of each identity, drawn at random
            drawn = {person: generator.choice(np.flatnonzero(ranked == person)) for person in set(ranked.tolist())}
            ranked = ranked[sorted(drawn.values())]
        firsts = list(dict.fromkeys(ranked.tolist()))
        shuffled.append([float(firsts.index(1) < k) for k in TOPK])
    # 2,000 orders: a standard error of 0.011 at most.
    assert list(expected.values()) == pytest.approx(np.mean(shuffled, axis=0).tolist(), abs=0.04)


@pytest.mark.parametrize(
    ("negatives", "positives", "tolerance"),
    [
        (1, 80_000, 1e-6),
        (4_000, 1, 1e-6),
        (100_000, 1, 2e-5),
        (20_000, 5, 1e-6),
        (600, 600, 1e-6),
        (300, 200, 1e-12),  # up to 511 tied images exact
    ],
)
def test_stays_within_the_stated_tolerance_when_very_many_are_tied(
    negatives: int, positives: int, tolerance: float
) -> None:
    people = [1] * positives + list(range(2, negatives + 2))
    ranks = (1, 5, 20, 50)
    unique = evaluate_ranking([np.zeros(len(people))], [1], people, cmc="unique_identity", topk=ranks)
    draws = [(negatives - np.arange(min(k, negatives))) / (len(people) - np.arange(min(k, negatives))) for k in ranks]
    wanted = [1 - np.prod(draw) if k <= negatives else 1.0 for k, draw in zip(ranks, draws, strict=True)]
    assert list(unique.cmc.values()) == pytest.approx(wanted, abs=tolerance)
    if negatives < 20_000:
        single = evaluate_ranking([np.zeros(len(people))], [1], people, cmc="single_gallery_shot", topk=ranks)
        shares = [min(1.0, k / (negatives + 1)) for k in ranks]
        assert list(single.cmc.values()) == pytest.approx(shares, abs=1e-9)


def test_stays_within_a_millionth_when_identities_have_very_different_numbers_of_tied_images() -> None:
    sizes = np.array([50_000, 300, 2])
    people = [1] * 7 + np.repeat([2, 3, 4], sizes).tolist()
    found = evaluate_ranking([np.zeros(len(people))], [1], people, cmc="unique_identity", topk=(1, 3))
    # Nobody else first: 7 of all. At least one of the others later: 1 - P(all of them first), by inclusion-exclusion.
    subsets = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    late = sum((-1) ** (len(one) + 1) * 7 / (7 + sizes[list(one)].sum()) for one in subsets)
    assert found.cmc[1] == pytest.approx(7 / len(people), abs=1e-6)
    assert found.cmc[3] == pytest.approx(late, abs=1e-6)

"""Tests of chatreid_plugin.eval.tied: the expectation equals the mean over every order of the tied items."""

from itertools import permutations
from typing import cast

import numpy as np
import pytest

from chatreid_plugin.eval.metrics import Ties, evaluate_ranking
from chatreid_plugin.eval.tied import AveragePrecision, measure_ranks


TOPK = (1, 2, 3, 5)


def average_over_orders(
    scores: list[int], matches: list[bool], definition: str, retrieved: int
) -> tuple[float, list[float], float]:
    """Sort every permutation of the items and average AP, CMC and INP computed from their plain definitions."""
    precisions, hits, penalties = [], [], []
    count = sum(matches)
    for order in permutations(range(len(scores))):
        ranked = sorted(order, key=lambda item: -scores[item])
        ranks = [rank for rank, item in enumerate(ranked) if matches[item]]
        total = 0.0
        for found, rank in enumerate(ranks):
            value = (found + 1) / (rank + 1)
            if definition == "trapezoid":
                value = (value + (found / rank if rank else 1.0)) / 2
            total += value if rank < retrieved else 0.0
        precisions.append(total / count)
        hits.append([float(ranks[0] < min(k, retrieved)) for k in TOPK])
        penalties.append(count / (ranks[-1] + 1) if ranks[-1] < retrieved else 0.0)
    return float(np.mean(precisions)), np.mean(hits, axis=0).tolist(), float(np.mean(penalties))


CASES = [
    ([1, 1, 1, 1, 1, 1], [True, False, False, True, False, True]),
    ([1, 1, 1, 1, 1, 1], [False, False, False, False, False, True]),
    ([3, 2, 2, 2, 1, 1], [False, True, False, True, True, False]),
    ([3, 3, 2, 2, 1, 1], [True, False, True, False, True, False]),
    ([5, 4, 4, 2, 2, 2], [True, True, True, False, False, True]),
    ([6, 5, 4, 3, 2, 1], [False, True, False, True, False, False]),
    ([2, 2, 2, 2, 1, 1], [True, True, True, False, False, False]),
]


@pytest.mark.parametrize("definition", ["mean", "trapezoid"])
@pytest.mark.parametrize("retrieved", [6, 3, 1])
@pytest.mark.parametrize(("scores", "matches"), CASES)
def test_expectation_equals_every_order_enumerated(
    scores: list[int], matches: list[bool], retrieved: int, definition: AveragePrecision
) -> None:
    expected = average_over_orders(scores, matches, definition, retrieved)
    found = evaluate_ranking(
        [scores],
        [1],
        [1 if match else 0 for match in matches],
        average_precision=definition,
        topk=TOPK,
        retrieved=[retrieved],
    )
    assert found.mean_ap == pytest.approx(expected[0], abs=1e-12)
    assert list(found.cmc.values()) == pytest.approx(expected[1], abs=1e-12)
    assert found.mean_inp == pytest.approx(expected[2], abs=1e-12)


def test_large_tie_groups_stay_exact_when_all_scores_are_equal() -> None:
    items, positives = 20_000, 3
    found = evaluate_ranking([np.zeros(items)], [1], [1] * positives + [0] * (items - positives), topk=(1, 20))
    assert found.cmc[1] == pytest.approx(positives / items)
    assert found.cmc[20] == pytest.approx(1 - np.prod([(items - positives - i) / (items - i) for i in range(20)]))
    assert 0 < found.mean_inp < found.mean_ap < 0.01


@pytest.mark.parametrize(("rule", "rank"), [("optimistic", 1), ("index", 2), ("pessimistic", 4)])
def test_rules_place_a_tied_positive_when_it_stands_second_of_four(rule: str, rank: int) -> None:
    found = evaluate_ranking([[1.0, 1.0, 1.0, 1.0]], [7], [0, 7, 0, 0], ties=cast(Ties, rule))
    assert found.mean_ap == pytest.approx(1 / rank)
    assert found.tie_rate == 1.0


def test_measure_ranks_gives_zero_beyond_what_was_retrieved() -> None:
    found = measure_ranks(np.array([0, 4]), (1, 5), "mean", 3)
    assert found.average_precision == pytest.approx(0.5)
    assert found.cmc.tolist() == [1.0, 1.0]
    assert found.inverse_negative_penalty == 0.0

"""Tests of chatreid_plugin.eval.identity_cmc: equal to every draw and tie order enumerated, and to published rules."""

from itertools import permutations, product

import numpy as np
import pytest

from chatreid_plugin.eval.identity_cmc import Cmc
from chatreid_plugin.eval.metrics import evaluate_ranking


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

"""Tests of chatreid_plugin.eval.identity_cmc: equal to every draw and tie order enumerated, and to published rules."""

from itertools import permutations, product
from types import ModuleType

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


def test_gives_the_golden_expectation_when_cuhk03_classic(golden: ModuleType) -> None:
    vectors = golden.make_vectors(seed=20250104, n_ids=100, n_q=965, n_pos=965, n_dis=0, n_cam=2, amp=5)
    assert int(vectors.gallery_person.sum()) == 49368
    features, labels = vectors.gallery_features.astype(np.float32), (vectors.gallery_person, vectors.gallery_camera)
    found = evaluate_ranking(
        features @ features.T,
        labels[0],
        labels[0],
        labels[1],
        labels[1],
        ignore="same_camera",
        cmc="single_gallery_shot",
        ties="index",
    )
    assert found.valid_queries == 953
    assert found.mean_ap == pytest.approx(0.7161912697641115, abs=1e-9)
    wanted = [0.7734510281385897, 0.9584646183183653, 0.9867935252293872, 0.995428639302375]
    assert list(found.cmc.values()) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("cmc", ["unique_identity", "single_gallery_shot"])
def test_positive_after_the_retrieved_items_is_a_miss_when_cmc_is_over_identities(cmc: Cmc) -> None:
    row, people = [[3.0, 2.0, 1.0]], [2, 1, 1]
    found = [evaluate_ranking(row, [1], people, cmc=cmc, topk=(1, 2), retrieved=[n]).cmc[2] for n in (1, 2, 3)]
    assert found == ([0.0, 1.0, 1.0] if cmc == "unique_identity" else [0.0, 0.5, 1.0])

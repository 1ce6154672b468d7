"""Tests of chatreid_plugin.eval.measure: candidates before the tail, ties kept as they are, the strict variant."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatreid_plugin.datasets.matching import Labels
from chatreid_plugin.eval.measure import Ranking, merge_scores
from chatreid_plugin.eval.metrics import evaluate_ranking


def make_array(values: list[float]) -> Any:
    return np.array(values, dtype=np.float32)


KEPT = np.array([3, 1])
SIMILARITIES = make_array([0.2, 0.8, 0.7, 0.9, 0.2])


def test_tail_follows_the_candidates_in_baseline_order() -> None:
    row = merge_scores(KEPT, make_array([-5.0, -3.0]), SIMILARITIES, 5)
    assert np.argsort(-row, kind="stable").tolist() == [1, 3, 2, 0, 4]
    assert row[0] == row[4]
    assert merge_scores(KEPT, make_array([-5.0, -3.0]), None, 5)[[0, 2, 4]].max() < -5.0
    nothing = np.zeros(5, dtype=np.bool_)

    def order(scores: list[float], ignored: Any) -> list[int]:
        places, values = np.arange(10, 15), make_array(scores)
        return Ranking(0, places, KEPT, values, SIMILARITIES, nothing, ignored, values).list_order().tolist()

    assert order([-5.0, -3.0], nothing) == [11, 13, 12, 10, 14]
    assert order([1.0, 1.0], np.arange(5) == 2) == [13, 11, 10, 14]
    assert order([1.0, 1.0], np.arange(5) == 3) == [11, 12, 10, 14]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_merging_keeps_order_and_ties_of_both_parts(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 30))
    values = st.floats(-1, 1, width=32, allow_subnormal=False)
    similarities = make_array(data.draw(st.lists(values, min_size=size, max_size=size)))
    kept = np.array(data.draw(st.permutations(range(size))), dtype=np.int64)[: data.draw(st.integers(0, size))]
    floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
    scores = make_array(data.draw(st.lists(floats, min_size=len(kept), max_size=len(kept))))
    row = merge_scores(kept, scores, similarities, size)
    tail = np.setdiff1d(np.arange(size), kept)
    assert np.array_equal(np.sign(row[kept][:, None] - row[kept]), np.sign(np.float64(scores)[:, None] - scores))
    difference = np.float64(similarities[tail])
    assert np.array_equal(np.sign(row[tail][:, None] - row[tail]), np.sign(difference[:, None] - difference))
    if len(kept) and len(tail):
        assert row[tail].max() < row[kept].min()


def make_labels() -> Labels:
    """One query of person 1; gallery images 0, 2 and 3 are matches, 4 is ignored."""
    same = np.array([1])
    clothes = np.array([0]), np.zeros(5, dtype=np.int64)
    return Labels(same, np.array([1, 0, 1, 1, 1]), np.array([9]), np.array([1, 1, 1, 1, 9]), *clothes, "same_camera")


def test_strict_counts_matches_in_the_tail_as_never_found() -> None:
    labels = make_labels()
    rows = [merge_scores(np.array([3, 1]), make_array([2.0, 5.0]), SIMILARITIES, 5)]

    def measure(**options: Any) -> Any:
        arguments = (labels.query_person, labels.gallery_person, labels.query_camera, labels.gallery_camera)
        return evaluate_ranking(rows, *arguments, ignore="same_camera", topk=(1, 2, 3), **options)

    full, strict = measure(), measure(retrieved=[2])
    # Order: 1 (no match), 3 (match), then the tail 2, 0 (matches at ranks 3 and 4).
    assert full.mean_ap == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)
    assert full.mean_inp == pytest.approx(3 / 4)
    assert strict.mean_ap == pytest.approx((1 / 2) / 3)
    assert strict.mean_inp == 0.0
    assert list(strict.cmc.values()) == [0.0, 1.0, 1.0]
    assert measure(retrieved=[1]).cmc[3] == 0.0

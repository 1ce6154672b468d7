"""Tests of chatreid_plugin.eval.inputs: what evaluate_ranking takes, what it refuses and why."""

from typing import Any

import numpy as np
import pytest

from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.metrics import evaluate_ranking


def rank_1(scores: Any, query_person: Any, gallery_person: Any, **options: Any) -> float:
    """Return Rank-1."""
    return evaluate_ranking(scores, query_person, gallery_person, **options).cmc[1]


@pytest.mark.parametrize("ignore", ["none", "camera", "Same_Camera", "same_cam", True, ["same_camera"], np.eye(2) > 0])
def test_names_the_choices_when_ignore_is_unknown(ignore: Any) -> None:
    with pytest.raises(ConfigError, match=r'choose "same_camera", "nothing", or a function'):
        evaluate_ranking([[1.0, 2.0]], [1], [1, 2], [1], [2, 1], ignore=ignore)


@pytest.mark.parametrize("cameras", [([1], [2, 1]), ([1], None), (None, [2, 1])])
def test_refuses_cameras_that_nothing_is_done_with(cameras: Any) -> None:
    with pytest.raises(ConfigError, match=r'Set ignore="same_camera" to .* or ignore="nothing" to'):
        evaluate_ranking([[1.0, 2.0]], [1], [1, 1], *cameras)
    assert rank_1([[1.0, 2.0]], [1], [2, 1], query_camera=[1], gallery_camera=[2, 1], ignore="nothing") == 1.0


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (([1], [1, 2], ["1"], [1, 2]), "Cameras of queries and gallery are of different types, such as '1' and 1"),
        ((np.array(["1"]), [1, 2], [1], [2, 2]), "Identities of queries and gallery are of different types"),
        (([(1, 2)], ["a", "b"], [1], [2, 2]), "Identities of queries and gallery are of different types"),
    ],
)
def test_refuses_labels_of_different_types_when_none_can_be_equal(labels: Any, what: str) -> None:
    with pytest.raises(DataError, match=what):
        evaluate_ranking([[1.0, 2.0]], *labels, ignore="same_camera")


@pytest.mark.parametrize(
    ("query", "gallery"),
    [
        ([("a", 1)], [("a", 2), ("a", 1)]),
        ([None], ["a", None]),
        ([1], ["1", 1]),
        ([2.0], np.array([1, 2])),
        (np.array([2]), [1, True + 1]),
        ([np.int64(2)], [1, 2]),
        (np.array(["b"]), ["a", "b"]),
        (np.array([b"b"]), [b"a", b"b"]),
    ],
)
def test_takes_labels_of_any_kind_that_compare_equal(query: Any, gallery: Any) -> None:
    assert rank_1([[1.0, 2.0]], query, gallery) == 1.0
    found = evaluate_ranking([[1.0, 2.0]], query, gallery, query, list(gallery)[::-1], ignore="same_camera")
    assert found.cmc[1] == 1.0


@pytest.mark.parametrize(
    ("query", "what"),
    [
        (np.array([[1]]), r"query_person has shape \(1, 1\)"),
        ([[1]], r"query_person\[0\] is \[1\]"),
        ([float("nan")], r"query_person\[0\] is nan"),
        (np.ma.masked_array([1], [True]), "query_person: a masked array"),
        (1, "query_person is 1"),
    ],
)
def test_refuses_labels_that_cannot_be_compared(query: Any, what: str) -> None:
    with pytest.raises(DataError, match=what):
        evaluate_ranking([[1.0, 2.0]], query, [1, 2])


@pytest.mark.parametrize("retrieved", [[1], [1, 2, 1], [1, -1], [1.0, 2.0], 5, [[1], [2]]])
def test_refuses_retrieved_that_is_no_count_for_each_query(retrieved: Any) -> None:
    with pytest.raises(DataError, match="a whole number from 0 on for each of 2 queries"):
        evaluate_ranking([[1.0, 2.0]] * 2, [1, 1], [1, 2], retrieved=retrieved)


@pytest.mark.parametrize("topk", [5, (), (0, 1), (-1,), (1.5,), "15", None])
def test_refuses_topk_that_is_no_list_of_ranks(topk: Any) -> None:
    with pytest.raises(ConfigError, match="give whole numbers from 1 on"):
        evaluate_ranking([[1.0, 2.0]], [1], [1, 2], topk=topk)


def test_takes_topk_from_a_generator() -> None:
    found = evaluate_ranking([[1.0, 2.0]], [1], [1, 2], topk=(k for k in (1, 2)), cmc="unique_identity")
    assert found.cmc == {1: 0.0, 2: 1.0}


@pytest.mark.parametrize(
    "row",
    [
        np.array([2**53, 2**53 + 1]),
        np.array([-(2**53) - 1, -(2**53)]),
        np.array([2**64 - 2, 2**64 - 1], dtype=np.uint64),
        np.array([1, 1 + np.finfo(np.longdouble).eps], dtype=np.longdouble),
        np.array([False, True]),
        np.array([1, 2], dtype=np.float16),
        np.ma.masked_array([1.0, 2.0], [False, False]),
    ],
)
def test_tells_neighbours_apart_whatever_the_type_of_the_scores(row: Any) -> None:
    found = evaluate_ranking([row], [1], [0, 1])
    assert (found.cmc[1], found.tie_rate) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("scores", "what"),
    [
        ([np.ma.masked_array([1.0, 2.0], [False, True])], "Scores of query 0: a masked array"),
        (np.ma.masked_array([[1.0, 2.0]], [[False, True]]), "Scores of query 0: a masked array"),
        ([[1.0, 2.0j]], "are of type complex128; they must be real"),
        ([["1", "2"]], "they must be real numbers"),
        ([[1.0, [2.0]]], "Scores of query 0: no array of numbers"),
        (1.0, "scores must be"),
        (np.array(1.0), "scores must be"),
    ],
)
def test_refuses_scores_that_are_no_real_numbers(scores: Any, what: str) -> None:
    with pytest.raises(DataError, match=what):
        evaluate_ranking(scores, [1], [1, 2])


@pytest.mark.slow
def test_takes_tensors_of_any_type_with_and_without_gradient() -> None:
    torch = pytest.importorskip("torch")
    person = torch.tensor([1]), torch.tensor([0, 1])
    for kind in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64):
        scores = torch.tensor([[1, 2]], dtype=kind)
        assert rank_1(scores, *person) == rank_1([scores[0]], list(person[0]), list(person[1])) == 1.0
    graded = torch.tensor([[1.0, 2.0]], requires_grad=True)
    assert (
        rank_1(graded, *person, retrieved=torch.tensor([2]), ignore=lambda query: torch.tensor([True, False])) == 1.0
    )
    with pytest.raises(DataError, match="no array of numbers"):
        rank_1([list(graded[0])], *person)


def test_says_what_to_set_when_top500_has_no_order_of_ties() -> None:
    with pytest.raises(ConfigError, match='set ties="index"'):
        evaluate_ranking([[1.0, 2.0]], [1], [1, 2], average_precision="top500")


@pytest.mark.parametrize(
    ("scores", "fault"),
    [
        (np.zeros((3, 2)), r"scores have shape \(3, 2\); expected .* It is transposed: give scores\.T\.$"),
        (np.zeros((2, 3, 1)), r"shape \(2, 3, 1\); .* sides of length 1 too many: give scores\.squeeze\(\)\.$"),
        (np.zeros((1, 3)), r"scores have shape \(1, 3\); expected \(queries, gallery\) = \(2, 3\)\.$"),
        ([np.zeros((1, 3))] * 2, r"Scores of query 0 have shape \(1, 3\); expected \(3,\)\. .* give row\.squeeze\(\)"),
    ],
)
def test_names_shape_and_remedy_of_scores(scores: Any, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        evaluate_ranking(scores, [1, 2], [1, 2, 2])


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_takes_scores_of_any_size(scale: float) -> None:
    assert rank_1(np.array([[1.0, 2.0]]) * scale, [1], [0, 1]) == 1.0

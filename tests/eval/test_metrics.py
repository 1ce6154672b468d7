"""Tests of chatreid_plugin.eval.metrics: golden vectors, invariances, and what it refuses."""

from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatreid_plugin.datasets.benchmark import Ties
from chatreid_plugin.datasets.matching import Labels
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.metrics import bootstrap_interval, evaluate_ranking


@pytest.mark.parametrize("name", ["market1501_size", "cuhk03_new_detected_size"])
def test_gives_the_golden_numbers_at_benchmark_size(golden: ModuleType, name: str) -> None:
    wanted = golden.read_golden(name)
    vectors = golden.make_vectors(**wanted["args"])
    similarities = vectors.compute_similarities()
    assert golden.rank_by_index(similarities[:1])[0, :10].tolist() == wanted["first_ranks"]
    labels = (vectors.query_person, vectors.gallery_person, vectors.query_camera, vectors.gallery_camera)
    expected = wanted["expected"]
    topk = [int(k) for k in expected["cmc"]]
    found = evaluate_ranking(similarities, *labels, ignore="same_camera", ties="index", topk=topk)
    assert found.valid_queries == expected["num_valid"]
    assert len(found.invalid_queries) == expected["num_q"] - expected["num_valid"]
    assert found.mean_ap == pytest.approx(expected["mAP"], abs=1e-12)
    assert found.mean_inp == pytest.approx(expected["mINP"], abs=1e-12)
    assert {str(k): value for k, value in found.cmc.items()} == pytest.approx(expected["cmc"], abs=1e-12)
    options: dict[str, Any] = {"ties": "index", "average_precision": "trapezoid"}
    trapezoid = evaluate_ranking(similarities, *labels, ignore="same_camera", **options)
    assert trapezoid.mean_ap == pytest.approx(expected["mAP_trapezoid"], abs=1e-12)
    first = evaluate_ranking(similarities, *labels, ignore="same_camera", ties="index", average_precision="top500")
    assert first.mean_ap == pytest.approx(wanted["instruct_reid_top500"], abs=1e-6)


@pytest.mark.parametrize(
    "name", ["cuhk03_classic_size", "ltcc_size", "t2i_cuhk_pedes_size", "regdb_size", "llcm_like"]
)
def test_gives_the_golden_numbers_of_each_setting(golden: ModuleType, name: str) -> None:
    wanted = golden.read_golden(name)
    vectors = golden.make_named(name)
    sums = {part: int(getattr(vectors, part).sum()) for part in wanted["checksums"]}
    assert sums == wanted["checksums"]
    similarities = vectors.compute_similarities()
    if "first_ranks" in wanted:
        assert golden.rank_by_index(similarities[:1])[0, :10].tolist() == wanted["first_ranks"]
    for setting in wanted["settings"].values():
        people = (vectors.query_person, vectors.gallery_person)
        cameras = (vectors.query_camera, vectors.gallery_camera)
        scores = similarities
        if setting.get("swap"):
            scores, people, cameras = similarities.T, people[::-1], cameras[::-1]
        expected = setting["expected"]
        ignore = setting["ignore"]
        if ignore in ("cloth_changing", "same_clothes"):
            clothes = (vectors.query_clothes, vectors.gallery_clothes)
            ignore = Labels(*people, *cameras, *clothes, rule=ignore).find_ignored
        options: dict[str, Any] = {"ignore": ignore or "nothing", "ties": "index"}
        topk = [int(k) for k in expected["cmc"]]
        found = evaluate_ranking(scores, *people, *cameras, cmc=setting["cmc"], topk=topk, **options)
        assert found.valid_queries == expected["num_valid"]
        assert len(found.invalid_queries) == expected["num_q"] - expected["num_valid"]
        assert found.mean_ap == pytest.approx(expected["mAP"], abs=1e-6)
        assert found.mean_inp == pytest.approx(expected["mINP"], abs=1e-6)
        assert list(found.cmc.values()) == pytest.approx(list(expected["cmc"].values()), abs=1e-6)
        trapezoid = evaluate_ranking(scores, *people, *cameras, average_precision="trapezoid", **options)
        assert trapezoid.mean_ap == pytest.approx(expected["mAP_trapezoid"], abs=1e-6)


@pytest.mark.parametrize("side", ["same_clothes", "different_clothes"])
def test_gives_the_golden_numbers_of_the_whole_gallery_and_of_single_shots_when_prcc(
    golden: ModuleType, side: str
) -> None:
    wanted = golden.read_golden("prcc_size")
    sides, trials = golden.make_clothes_vectors(**wanted["args"])
    vectors, setting = sides[side], wanted["settings"][side]
    assert int(trials.sum()) == wanted["sum_of_trials"]
    sums = {part: int(getattr(vectors, part).sum()) for part in setting["checksums"]}
    assert sums == setting["checksums"]
    similarities, expected = vectors.compute_similarities(), setting["expected"]
    people, topk = (vectors.query_person, vectors.gallery_person), [int(k) for k in expected["cmc"]]
    found = evaluate_ranking(similarities, *people, ties="index", topk=topk)
    assert found.valid_queries == expected["num_valid"]
    assert found.mean_ap == pytest.approx(expected["mAP"], abs=1e-6)
    assert found.mean_inp == pytest.approx(expected["mINP"], abs=1e-6)
    assert list(found.cmc.values()) == pytest.approx(list(expected["cmc"].values()), abs=1e-6)
    for trial, rank_1 in zip(trials, setting["rank_1_of_first_trials"], strict=False):
        one = evaluate_ranking(similarities[:, trial], people[0], people[1][trial], ties="index")
        assert one.cmc[1] == pytest.approx(rank_1, abs=1e-6)


def test_gives_the_golden_numbers_for_junk_distractors_and_unmatched_queries(golden: ModuleType) -> None:
    wanted = golden.read_golden("edge_small")
    inputs, expected = wanted["inputs"], wanted["expected"]
    scores = -np.array(inputs["R"], dtype=np.float32)
    gallery_person, gallery_camera = np.array(inputs["g_pids"]), np.array(inputs["g_cams"])

    def ignore(query: int) -> Any:
        same = (gallery_person == inputs["q_pids"][query]) & (gallery_camera == inputs["q_cams"][query])
        return same | (gallery_person == -1)

    found = evaluate_ranking(scores, inputs["q_pids"], gallery_person, ignore=ignore, topk=(1, 2, 3, 5))
    assert found.invalid_queries == (3, 4)
    assert found.query_indices.tolist() == [0, 1, 2]
    assert found.mean_ap == pytest.approx(expected["mAP"])
    assert found.mean_inp == pytest.approx(expected["mINP"])
    assert list(found.cmc.values()) == pytest.approx(wanted["expected_cmc_1_2_3_5"])
    labels = (inputs["q_pids"], gallery_person, inputs["q_cams"], gallery_camera)
    with_junk = evaluate_ranking(scores, *labels, ignore="same_camera")
    assert with_junk.mean_ap == pytest.approx(wanted["expected_map_junk_not_removed"])
    trapezoid = evaluate_ranking(
        scores, inputs["q_pids"], gallery_person, ignore=ignore, average_precision="trapezoid"
    )
    assert trapezoid.mean_ap == pytest.approx(expected["mAP_trapezoid"])


def test_gives_the_golden_numbers_when_the_gallery_is_smaller_than_k(golden: ModuleType) -> None:
    wanted = golden.read_golden("small_gallery")
    inputs = wanted["inputs"]
    labels = (inputs["q_pids"], inputs["g_pids"], inputs["q_cams"], inputs["g_cams"])
    found = evaluate_ranking(-np.array(inputs["R"]), *labels, ignore="same_camera", topk=range(1, 9))
    assert list(found.cmc.values()) == wanted["expected_cmc_1_to_8"]
    assert found.mean_ap == pytest.approx(wanted["expected"]["mAP"])
    assert found.mean_inp == pytest.approx(wanted["expected"]["mINP"])


@pytest.mark.parametrize("levels", ["2", "5", "11", "101", "1000000"])
def test_gives_the_golden_numbers_of_each_tie_rule(golden: ModuleType, levels: str) -> None:
    wanted = golden.read_golden("ties")
    vectors = golden.make_vectors(**wanted["args"])
    similarities = vectors.compute_similarities().astype(np.int64)
    low, high = similarities.min(), similarities.max()
    # Floored in floating point, as the reference did.
    scores = np.floor((similarities - low) / (high - low + 1) * int(levels))
    labels = (vectors.query_person, vectors.gallery_person, vectors.query_camera, vectors.gallery_camera)
    found = {
        rule: evaluate_ranking(scores, *labels, ignore="same_camera", ties=cast(Ties, rule))
        for rule in ("index", "optimistic", "pessimistic", "expected")
    }
    for rule, expected in wanted["levels"][levels].items():
        assert found[rule].cmc[1] == pytest.approx(expected["r1"], abs=1e-12), rule
        assert found[rule].mean_ap == pytest.approx(expected["mAP"], abs=1e-12), rule
    assert found["pessimistic"].mean_ap < found["expected"].mean_ap < found["optimistic"].mean_ap
    assert found["pessimistic"].mean_inp <= found["expected"].mean_inp <= found["optimistic"].mean_inp


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_is_the_same_when_gallery_or_queries_are_permuted(data: st.DataObject) -> None:
    queries, gallery = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 12))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scores = generator.integers(0, data.draw(st.integers(1, 6)), (queries, gallery)).astype(np.float32)
    query_person, query_camera = generator.integers(0, 3, queries), generator.integers(0, 2, queries)
    gallery_person, gallery_camera = generator.integers(0, 3, gallery), generator.integers(0, 2, gallery)
    rows, columns = generator.permutation(queries), generator.permutation(gallery)
    first = (scores, query_person, gallery_person, query_camera, gallery_camera)
    second = (scores[rows][:, columns], query_person[rows], gallery_person[columns])
    second += (query_camera[rows], gallery_camera[columns])
    try:
        before = evaluate_ranking(*first, ignore="same_camera")
    except DataError:
        with pytest.raises(DataError):
            evaluate_ranking(*second, ignore="same_camera")
        return
    after = evaluate_ranking(*second, ignore="same_camera")
    assert after.mean_ap == pytest.approx(before.mean_ap, abs=1e-12)
    assert after.mean_inp == pytest.approx(before.mean_inp, abs=1e-12)
    assert after.cmc == pytest.approx(before.cmc, abs=1e-12)
    assert after.tie_rate == pytest.approx(before.tie_rate)


def test_top500_cuts_before_it_removes_what_is_ignored() -> None:
    scores = -np.arange(600.0)
    people = np.zeros(600, dtype=np.int64)
    people[[3, 10, 499, 500]] = 1

    def ignore(query: int) -> Any:
        return np.arange(600) < 2

    options: dict[str, Any] = {"average_precision": "top500", "ties": "index", "ignore": ignore}
    found = evaluate_ranking([scores], [1], people, **options)
    assert found.mean_ap == pytest.approx((1 / 2 + 2 / 9 + 3 / 498) / 3)
    # What was not retrieved adds nothing, and is still divided by.
    cut = evaluate_ranking([scores], [1], people, retrieved=[9], **options)
    assert cut.mean_ap == pytest.approx((1 / 2 + 2 / 9) / 3)
    people[[3, 10, 499]] = 0
    assert evaluate_ranking([scores], [1], people, **options).mean_ap == 0.0


def test_takes_rows_one_by_one_and_text_labels() -> None:
    rows = (row for row in [[0.9, 0.1, 0.5], [0.2, 0.8, 0.3]])
    found = evaluate_ranking(rows, ["a", "b"], ["a", "b", "c"], ["1", "1"], ["2", "2", "1"], ignore="same_camera")
    assert found.mean_ap == found.cmc[1] == found.mean_inp == 1.0


def test_keeps_close_scores_apart_when_float64() -> None:
    found = evaluate_ranking(np.array([[1.0 + 1e-12, 1.0]]), [1], [1, 0])
    assert found.tie_rate == 0.0
    assert found.mean_ap == 1.0


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_refuses_scores_that_are_not_numbers(wrong: float) -> None:
    with pytest.raises(DataError, match=r"query 1 hold 1 NaN or infinite value\(s\), first at gallery item 2"):
        evaluate_ranking([[3, 2, 1], [0, 1, wrong]], [1, 1], [1, 2, 3])


@pytest.mark.parametrize("rows", [[[1.0, 2.0]], [[1.0, 2.0]] * 3])
def test_refuses_a_wrong_number_of_rows(rows: list[list[float]]) -> None:
    with pytest.raises(DataError, match="rows of scores"):
        evaluate_ranking(rows, [1, 1], [1, 2])


def test_refuses_a_row_of_the_wrong_length() -> None:
    with pytest.raises(DataError, match=r"query 0 have shape \(3,\); expected \(2,\)"):
        evaluate_ranking([[1.0, 2.0, 3.0]], [1], [1, 2])


def test_refuses_an_ignore_mask_of_the_wrong_length() -> None:
    with pytest.raises(DataError, match=r"ignore\(0\) has shape"):
        evaluate_ranking([[1.0, 2.0]], [1], [1, 2], ignore=lambda query: np.zeros(3, dtype=np.bool_))


def test_refuses_cameras_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="1 query and 1 gallery cameras"):
        evaluate_ranking([[1.0, 2.0]], [1], [1, 2], [1], [1], ignore="same_camera")


def test_says_why_when_no_query_is_valid() -> None:
    with pytest.raises(DataError) as caught:
        evaluate_ranking([[1, 2], [1, 2]], ["a", "z"], ["a", "b"], [1, 1], [1, 1], ignore="same_camera")
    assert "query 0 (identity a): all its gallery images are ignored (only seen by the query's own" in str(
        caught.value
    )
    assert "query 1 (identity z): identity absent from the gallery" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"ties": "lucky"},
        {"cmc": "other"},
        {"average_precision": "other"},
        {"average_precision": "top500"},
        {"ignore": "same_camera"},
    ],
)
def test_refuses_options_it_does_not_know(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        evaluate_ranking([[1.0, 2.0]], [1], [1, 2], **options)


def test_bootstrap_interval_is_seeded_and_holds_the_mean() -> None:
    values = np.random.default_rng(1).random(500)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(4 * values.std() / np.sqrt(len(values)), rel=0.15)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)

"""Tests of chatreid_plugin.engine.statistics.expectations: intended distributions and verdicts with known answers."""

import numpy as np
import pytest

from chatreid_plugin.config import GallerySettings
from chatreid_plugin.engine.statistics.expectations import (
    compare,
    compare_yes_no,
    compute_gallery_probabilities,
    compute_match_probabilities,
    compute_p_value,
    find_smallest_matches,
)
from chatreid_plugin.tasks import TASKS


def test_gallery_sizes_are_uniform_between_their_limits_where_one_image_is_right() -> None:
    probabilities = compute_gallery_probabilities(GallerySettings(min_size=2, max_size=5), None)
    assert probabilities.tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25]
    drawn = compute_gallery_probabilities(GallerySettings(min_size=2, max_size=5, matches="inverse"), 2)
    assert drawn == pytest.approx(probabilities)


def test_gallery_sizes_lean_to_large_ones_where_every_number_of_matches_is_as_frequent() -> None:
    # n = 2: N is 2, 3 or 4; n = 3: 3 or 4; n = 4: 4.
    probabilities = compute_gallery_probabilities(GallerySettings(min_size=2, max_size=4), 2)
    assert probabilities == pytest.approx([0, 0, 1 / 9, 1 / 9 + 1 / 6, 1 / 9 + 1 / 6 + 1 / 3])


def test_matches_are_mixed_over_the_gallery_sizes() -> None:
    # N = 2: n = 2 always. N = 3: 1/1 and 1/2, so 2/3 and 1/3. Each N has half of the weight.
    gallery = GallerySettings(min_size=2, max_size=3, matches="inverse")
    assert compute_match_probabilities(gallery, 2) == pytest.approx([0, 0, 1 / 2 + 1 / 3, 1 / 6])
    # From 1 on: 1/2, 1/2 and 2/5, 2/5, 1/5.
    assert compute_match_probabilities(gallery, 1) == pytest.approx([0, 0.45, 0.45, 0.1])
    uniform = GallerySettings(min_size=3, max_size=3, matches="uniform")
    assert compute_match_probabilities(uniform, 2) == pytest.approx([0, 0, 0.5, 0.5])
    overall = GallerySettings(min_size=3, max_size=6)
    assert compute_match_probabilities(overall, 2) == pytest.approx([0, 0, 0.2, 0.2, 0.2, 0.2, 0.2])


def test_equation_1_holds_for_the_tasks_that_draw_several_matches() -> None:
    found = {name: smallest for name, task in TASKS.items() if (smallest := find_smallest_matches(task)) is not None}
    assert found.pop("image_to_image_many_to_many") == 2
    assert "standard_reid" in found
    assert set(found.values()) == {1}
    assert {TASKS[name].stages for name in found} == {(3,)}


def test_p_value_is_pearsons() -> None:
    # Statistic (10^2 + 10^2) / 50 = 4 with one degree of freedom.
    assert compute_p_value(np.array([60, 40]), np.array([50.0, 50.0])) == pytest.approx(0.0455, abs=1e-4)


def test_small_classes_are_pooled() -> None:
    pooled = compute_p_value(np.array([60, 40]), np.array([54.0, 46.0]))
    assert compute_p_value(np.array([60, 36, 4]), np.array([54.0, 42.0, 4.0])) == pytest.approx(pooled)
    apart = compute_p_value(np.array([60, 36, 4]), np.array([54.0, 40.0, 6.0]))
    assert compute_p_value(np.array([60, 36, 2, 2]), np.array([54.0, 40.0, 3.0, 3.0])) == pytest.approx(apart)


@pytest.mark.parametrize(
    ("counts", "expected", "p_value"),
    [([3, 1], [2.0, 2.0], None), ([0, 10, 1], [0.0, 11.0, 0.0], 0.0), ([0, 10], [0.0, 10.0], 1.0)],
)
def test_p_value_where_there_is_no_test(counts: list[int], expected: list[float], p_value: float | None) -> None:
    assert compute_p_value(np.array(counts), np.array(expected)) == p_value


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ([0, 0, 505, 495], "as intended"),
        ([0, 0, 900, 100], "limited by data"),
        ([0, 0, 100, 900], "differs"),
        ([0, 0, 500, 490, 10], "differs"),
        ([0, 0, 2, 1], "too few records"),
    ],
)
def test_verdict_says_in_which_way_the_records_differ(counts: list[int], verdict: str) -> None:
    found = compare(np.array(counts), np.array([0, 0, 0.5, 0.5]))
    assert found.verdict == verdict
    assert found.counts == {value: count for value, count in enumerate(counts) if count}


def test_matches_cut_down_to_six_are_limited_by_data_whatever_their_mean() -> None:
    # 250 records of people with six positives; by chance they have few records with one match, and a larger mean.
    counts = np.array([0, 71, 83, 35, 23, 13, 25])
    probabilities = compute_match_probabilities(GallerySettings(min_size=2, max_size=10, matches="inverse"), 1)
    assert (counts * np.arange(7)).sum() > 250 * (probabilities * np.arange(11)).sum()
    assert compare(counts, probabilities).verdict == "limited by data"


def test_too_few_yes_are_never_put_down_to_the_data() -> None:
    assert compare_yes_no(100, 900).verdict == compare_yes_no(900, 100).verdict == "differs"
    assert compare_yes_no(510, 490).verdict == "as intended"
    assert compare_yes_no(510, 490).counts == {0: 490, 1: 510}

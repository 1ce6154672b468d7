"""Tests of chatreid_plugin.engine.draws: groups hold every row once, and draws are fair and without repeats."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from chatreid_plugin.engine.draws import Groups, draw_among, number, pick, view


@given(st.lists(st.integers(-1, 5), min_size=1))
def test_groups_hold_the_rows_of_a_label_in_order(labels: list[int]) -> None:
    groups = Groups(np.array(labels, dtype=np.int64))
    assert len(groups) == len(set(labels))
    for row, label in enumerate(labels):
        assert list(groups.list_alike(row)) == [i for i, other in enumerate(labels) if other == label]


def test_groups_may_hold_something_else_than_rows() -> None:
    groups = Groups(np.array([7, 3, 7, -1]), np.array([10, 20, 30, 40]))
    assert [list(groups.list_alike(row)) for row in range(4)] == [[10, 30], [20], [10, 30], [40]]


def test_no_rows_have_no_groups() -> None:
    assert len(Groups(np.zeros(0, dtype=np.int64))) == 0


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 10**9), st.integers(-1, 1)), min_size=1, max_size=30))
def test_numbers_are_equal_where_all_labels_are(rows: list[tuple[int, int, int]]) -> None:
    numbers = number(*np.array(rows, dtype=np.int64).T).tolist()
    assert set(numbers) == set(range(len(set(rows))))
    assert len(set(zip(rows, numbers, strict=True))) == len(set(rows))


def test_view_gives_plain_integers() -> None:
    numbers = view(np.array([3, 5], dtype=np.int16))
    assert type(numbers[0]) is int
    assert list(numbers[1:]) == [5]


def test_every_option_is_picked_as_often() -> None:
    rng = random.Random(0)
    counts = Counter(pick(rng, view(np.arange(7) * 2)) for _ in range(7000))
    assert set(counts) == set(range(0, 14, 2))
    assert chisquare(list(counts.values())).pvalue > 0.001


@given(
    st.integers(0, 20),
    st.sets(st.integers(0, 19)),
    st.sets(st.integers(0, 19)),
    st.integers(0, 25),
    st.integers(0, 99),
)
def test_draws_are_accepted_options_without_repeats(
    options: int, accepted: set[int], taken: set[int], count: int, seed: int
) -> None:
    chosen = draw_among(random.Random(seed), range(options), accepted.__contains__, count, taken)
    possible = accepted & set(range(options)) - taken
    assert len(chosen) == len(set(chosen)) == min(count, len(possible))
    assert set(chosen) <= possible


@pytest.mark.parametrize("accepted", [range(10), (3, 7, 11)])
def test_every_accepted_option_is_drawn_as_often(accepted: range | tuple[int, ...]) -> None:
    # Few of a hundred options: most draws end with a look at all of them.
    options = range(10) if len(accepted) == 10 else range(100)
    counts = Counter(
        option for seed in range(3000) for option in draw_among(random.Random(seed), options, accepted.__contains__, 2)
    )
    assert sum(counts.values()) == 6000
    assert chisquare([counts[option] for option in accepted]).pvalue > 0.001


def test_search_may_end_early() -> None:
    asked: list[int] = []

    def accept(option: int) -> bool:
        asked.append(option)
        return option == 5000

    assert draw_among(random.Random(0), range(10_000), accept, 2, look_at_all=False) == []
    assert len(asked) < 50
    assert draw_among(random.Random(0), range(10_000), accept, 2) == [5000]

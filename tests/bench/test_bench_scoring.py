"""The work that bench_scoring.py counts, against sums made by hand: 8 queries, 100 candidates, 101 + 52 tokens."""

import runpy
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("generate, a pair", 800 * (2 * 235e9 + 153 * 2.62e9)),  # 871 GFLOP a pair
        ("whole questions", 108 * 235e9 + 800 * 153 * 2.62e9),  # 433
        ("fast path", 108 * 235e9 + 8 * 101 * 2.62e9 + 800 * 52 * 2.62e9),  # 171
    ],
)
def test_counts_what_each_path_computes(path: str, expected: float) -> None:
    script = runpy.run_path(str(Path(__file__).with_name("bench_scoring.py")))
    assert script["count_flops"](path, queries=8, candidates=100, question=153, prefix=101) == pytest.approx(expected)

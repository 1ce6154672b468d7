"""What bench_scoring.py computes: its paths agree on a few pairs, and its work is that of sums made by hand."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("bench_scoring.py")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("generate, a pair", 800 * (2 * 235e9 + 153 * 2.62e9)),  # 871 GFLOP a pair
        ("whole questions", 108 * 235e9 + 800 * 153 * 2.62e9),  # 433
        ("fast path", 108 * 235e9 + 8 * 101 * 2.62e9 + 800 * 52 * 2.62e9),  # 171
    ],
)
def test_counts_what_each_path_computes(path: str, expected: float) -> None:
    """8 queries, 100 candidates, 101 + 52 tokens."""
    script = runpy.run_path(str(SCRIPT))
    assert script["count_flops"](path, queries=8, candidates=100, question=153, prefix=101) == pytest.approx(expected)


@pytest.mark.slow
def test_every_path_of_the_scoring_benchmark_gives_the_margins_of_generate():
    """The script reaches into private parts of the code, so that it would rot unseen."""
    command = [sys.executable, str(SCRIPT), "--queries", "2", "--candidates", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"largest difference (\S+)", done.stdout)
    assert len(differences) == 3, done.stdout
    assert all(float(value) < 1e-4 for value in differences)

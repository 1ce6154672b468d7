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
        ("generate(), a pair", 800 * (2 * 180 * 1.3e9 + 153 * 2.62e9)),  # 869 GFLOP a pair
        ("whole questions", 108 * 180 * 1.3e9 + 800 * 153 * 2.62e9),  # 433
        ("fast path", 108 * 180 * 1.3e9 + 8 * 101 * 2.62e9 + 800 * 52 * 2.62e9),  # 171
    ],
)
def test_counts_what_each_path_computes(path: str, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 queries, 100 candidates, 101 + 52 tokens."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = runpy.run_path(str(SCRIPT))
    work = script["Work"](patch=1.2e9, attention=0.1e9 / 180, token=2.62e9, answer=0.0)
    lengths = {"patches": 180, "question": 153, "prefix": 101}
    assert script["count_flops"](work, path, queries=8, candidates=100, **lengths) == pytest.approx(expected)


@pytest.mark.slow
def test_every_path_of_the_scoring_benchmark_gives_the_margins_of_generate():
    """The script reaches into private parts of the code, so that it would rot unseen."""
    command = [sys.executable, str(SCRIPT), "--queries", "2", "--candidates", "3", "--naive-candidates", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| 2 \| (.+?) \| (\d+) \|.*\| - \| \d+\.\d+ \| (\S+) \|$", done.stdout, re.MULTILINE)
    assert [row[:2] for row in rows] == [("generate(), a pair", "4"), ("whole questions", "6"), ("fast path", "6")]
    assert all(float(row[2]) < 1e-4 for row in rows)

"""Benchmarks reach into private parts of the code: this one is run on a few pairs, so that it does not rot unseen."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


BENCH = Path(__file__).parent / "bench"


@pytest.mark.slow
def test_every_path_of_the_scoring_benchmark_gives_the_margins_of_generate():
    command = [sys.executable, str(BENCH / "bench_scoring.py"), "--queries", "2", "--candidates", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"largest difference (\S+)", done.stdout)
    assert len(differences) == 3, done.stdout
    assert all(float(value) < 1e-4 for value in differences)

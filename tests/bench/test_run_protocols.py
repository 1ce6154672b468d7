"""The table of run_protocols.py and its exit code, for one benchmark in three modes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("run_protocols.py")
ROOT = SCRIPT.parents[2]


def run(checkpoint: Path, work: Path) -> tuple[int, list[list[str]]]:
    """Return the exit code and the cells of the table's lines, below its head."""
    command = [sys.executable, str(SCRIPT), str(checkpoint), "--case=attributes-peta", f"--work={work}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # this tree, also where another one is installed
    result = subprocess.run(
        [*command, "--device=cpu"], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    lines = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert lines, result.stderr[-3000:]
    return result.returncode, lines[1:]


@pytest.mark.slow
def test_tells_a_whole_run_from_one_that_failed(checkpoint: Path, tmp_path: Path) -> None:
    code, lines = run(checkpoint, tmp_path)
    assert code == 0
    assert [line[:7] for line in lines] == [
        ["attributes", "peta", mode, "2", "4", "100 / 100", "75.0 / 50.0"] for mode in ("pointwise", "choice", "turns")
    ]
    assert [line[-1] for line in lines] == ["margins", "log_odds", "order"]
    assert run(checkpoint, tmp_path) == (0, lines)
    code, lines = run(tmp_path / "absent", tmp_path)
    assert code == 1
    assert [line[2] for line in lines] == ["pointwise", "choice", "turns"]
    assert all(line[3].startswith("FAILED: model_name_or_path: the folder") for line in lines)

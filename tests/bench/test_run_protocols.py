"""The table of run_protocols.py and its exit code, for one benchmark in three modes."""

import runpy
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("run_protocols.py")


def test_tells_a_whole_run_from_one_that_failed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds a folder
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(model: Path) -> tuple[int, list[list[str]]]:
        """Return the exit code and the cells of the table's lines, below its head."""
        options = ["--case=attributes-peta", f"--work={tmp_path}", "--device=cpu"]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(model), *options])
        code = main()
        lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
        return code, [line for line in lines if len(line) > 1][1:]

    code, lines = run(checkpoint)
    assert code == 0
    assert [line[:7] for line in lines] == [
        ["attributes", "peta", mode, "2", "4", "100 / 100", "75.0 / 50.0"] for mode in ("pointwise", "choice", "turns")
    ]
    assert [line[-1] for line in lines] == ["margins", "log_odds", "order"]
    assert run(checkpoint) == (0, lines)
    code, lines = run(tmp_path / "absent")
    assert code == 1
    assert [line[2] for line in lines] == ["pointwise", "choice", "turns"]
    assert all(line[3].startswith("FAILED: model.model_name_or_path: the folder") for line in lines)

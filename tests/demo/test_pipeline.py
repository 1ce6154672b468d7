"""The demo, quick: every command of the README runs, a second call runs nothing again, a table comes out."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from chatreid_plugin.demo import pipeline
from chatreid_plugin.demo.pipeline import DemoSteps, run_demo
from chatreid_plugin.errors import ConfigError, UpstreamError
from chatreid_plugin.shards import read_json


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quick_demo_goes_the_whole_way_and_does_nothing_twice(
    run_command: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def run(command: list[str], cwd: Path, stdout: BinaryIO, **_: Any) -> subprocess.CompletedProcess[str]:
        done = run_command(command, cwd)
        stdout.write((done.stdout + done.stderr).encode())
        return done

    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
    folder = tmp_path / "demo"
    pipeline.run_demo(folder, quick=True, seed=3)
    printed = capsys.readouterr().out
    for row in ("random", "untrained model", "after Stage 1", "after Stage 2", "after Stage 3", "the filter alone"):
        assert row in printed
    assert (folder / "results" / "after_Stage_3" / "report.html").is_file()
    commands = {
        name: read_json(folder / "steps" / f"{name}.json")["inputs"]["command"] for name in ("tiny_model", "stage2")
    }
    assert "--seed=3" in commands["tiny_model"] and "seed=45" in commands["stage2"]
    assert "\nseed: 3\n" in (folder / "build.yaml").read_text()
    metrics = read_json(folder / "results" / "after_Stage_3" / "results.json")["metrics"]
    assert f"{100 * metrics['mAP']:.1f}" in printed
    weights = (folder / "saves" / "stage3" / "model.safetensors").stat().st_mtime_ns
    pipeline.run_demo(folder, quick=True, seed=3)
    assert capsys.readouterr().out.count("done before") == printed.count(" s\n")
    assert (folder / "saves" / "stage3" / "model.safetensors").stat().st_mtime_ns == weights


def test_step_runs_again_when_an_earlier_one_did(tmp_path: Path) -> None:
    count = [sys.executable, "-c", "open('runs', 'a').write('x')"]
    for _ in range(2):
        steps = DemoSteps(tmp_path)
        steps.run("first", [sys.executable, "-c", "pass"])
        steps.run("second", count)
    assert (tmp_path / "runs").read_text() == "x"
    steps = DemoSteps(tmp_path)
    steps.run("first", [sys.executable, "-c", "1"])
    steps.run("second", count)
    assert (tmp_path / "runs").read_text() == "xx"


def test_failed_step_shows_the_end_of_its_log_and_is_not_done(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"]
    with pytest.raises(UpstreamError, match="exit code 3(.|\n)*what went wrong"):
        DemoSteps(tmp_path).run("step", command)
    assert not (tmp_path / "steps" / "step.json").exists()


def test_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="was not made by the demo"):
        run_demo(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"

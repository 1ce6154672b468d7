"""Tests of ``chatreid caption`` as a process of its own: killed or interrupted, then run again."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatreid_plugin.config import BuildSettings


NAMES = [f"{number:03d}.jpg" for number in range(30)]


@pytest.fixture
def command(fast_programs: Path, make_captioning: Callable[..., BuildSettings], tmp_path: Path) -> list[str]:
    """Return the command for 30 images."""
    path = tmp_path / "recipe.yaml"
    settings = make_captioning(images=len(NAMES), concurrency=3)
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return [str(fast_programs / "python"), "-m", "chatreid_plugin", "caption", str(path), "--json"]


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_run_goes_on_where_it_was(
    command: list[str], endpoint: Any, tmp_path: Path, signal_number: signal.Signals
) -> None:
    usual = endpoint.reply
    endpoint.reply = lambda name, before: replace(usual(name, before), delay=0.1)
    # A handler of its own: the tests may run where SIGINT is ignored, as in the background of a shell.
    fresh = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, preexec_fn=fresh, **pipes)
    deadline = time.monotonic() + 60
    while len(endpoint.images) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal_number)
    _, error = process.communicate(timeout=20)
    if signal_number != signal.SIGKILL:
        assert process.returncode == 130
        assert "the same command goes on from there" in error
        assert "Traceback" not in error
    path = tmp_path / "manifests" / "own.captions.jsonl"
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 5 <= len(kept) < len(NAMES)
    asked = len(endpoint.images)
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[: len(kept)] == kept
    assert sorted(json.loads(line)["path"] for line in lines) == NAMES
    assert sorted(endpoint.images[asked:] + [json.loads(line)["path"] for line in kept]) == NAMES
    report = json.loads(result.stdout)["sources"][0]
    assert (report["answered_before"], report["answered"]) == (len(kept), len(NAMES) - len(kept))


def test_wrong_key_is_one_line_and_exit_code_4(command: list[str], endpoint: Any) -> None:
    endpoint.misbehave("probe", 9, status=401, body={"error": {"message": "wrong key"}})
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 4
    assert result.stderr.splitlines()[-1].startswith("chatreid: 127.0.0.1:")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_dry_run_in_json_names_a_source_and_overrides(command: list[str], endpoint: Any) -> None:
    arguments = [*command, "own", "captioning.model=gpt-5", "--limit", "3", "--dry-run"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    report = json.loads(result.stdout)
    assert report["model"] == "gpt-5"
    assert report["sources"] == [{"source": "own", "images": 30, "answered": 0, "waiting": 3}]
    assert endpoint.asked == []

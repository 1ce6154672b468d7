"""What the user sees last when torchrun stops: our message, and not the tracebacks of torchrun and LLaMA-Factory."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.training import hooks
from chatreid_plugin.training.hooks import MESSAGES_VARIABLE, pass_on_message


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs a command through the extended launcher, with ``run`` in place of LLaMA-Factory."""
    monkeypatch.setenv(MESSAGES_VARIABLE, "")

    def run_command(run: Callable[[], None], *arguments: str) -> None:
        def launch() -> None:
            sys.argv.pop(1)
            run()

        module = ModuleType("llamafactory.launcher")
        module.launch = launch  # type: ignore[attr-defined]
        monkeypatch.setattr(sys, "argv", ["llamafactory-cli", *arguments])
        hooks.extend_launcher(module)
        module.launch()

    return run_command


def test_messages_of_all_processes_come_last_and_each_once(
    start: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        for message in ("chatreid: ConfigError: two\nlines", "chatreid: DataError: other"):
            pass_on_message(message)
            pass_on_message(message)
        raise subprocess.CalledProcessError(3, "torchrun")

    with pytest.raises(SystemExit) as caught:
        start(run, "train", "recipe.yaml")
    assert caught.value.code == 3
    assert capsys.readouterr().err == "chatreid: ConfigError: two\nlines\nchatreid: DataError: other\n"
    assert not Path(os.environ[MESSAGES_VARIABLE]).parent.exists()


def test_what_we_know_nothing_of_is_left_as_it_is(start: Callable[..., None]) -> None:
    def fail() -> None:
        raise subprocess.CalledProcessError(1, "torchrun")

    for arguments in (("train", "recipe.yaml"), ("export", "recipe.yaml")):
        with pytest.raises(subprocess.CalledProcessError):
            start(fail, *arguments)
    pass_on_message("nobody waits for it")


def test_torchrun_without_a_gpu_is_refused_with_what_to_set(
    start: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import llamafactory.extras.misc as misc

    started: list[str] = []
    monkeypatch.setattr(misc, "get_device_count", lambda: 0)
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    with pytest.raises(ConfigError, match="there is none here.*deepspeed=null bf16=false.*NPROC_PER_NODE"):
        start(lambda: started.append("no"), "train", "recipe.yaml")
    start(lambda: started.append("export"), "export", "recipe.yaml")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    start(lambda: started.append("two"), "train", "recipe.yaml")
    monkeypatch.delenv("NPROC_PER_NODE")
    monkeypatch.setattr(misc, "get_device_count", lambda: 1)
    start(lambda: started.append("gpu"), "train", "recipe.yaml")
    monkeypatch.delenv("FORCE_TORCHRUN")
    monkeypatch.setattr(misc, "get_device_count", lambda: 0)
    start(lambda: started.append("cpu"), "train", "recipe.yaml")
    assert started == ["export", "two", "gpu", "cpu"]

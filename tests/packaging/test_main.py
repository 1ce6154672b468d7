"""``python -m chatreid_plugin`` where no ``.pth`` is at work, with a stand-in LLaMA-Factory on PYTHONPATH."""

import importlib.util
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chatreid_plugin


REPOSITORY = Path(chatreid_plugin.__file__).parent.parent
# The stand-in starts torchrun as LLaMA-Factory does: one string, cut at the spaces, with its own file in the middle.
LAUNCHER = """
import os, subprocess, sys

def launch():
    command = sys.argv.pop(1)
    if command == "train" and os.environ.get("FORCE_TORCHRUN"):
        line = "torchrun --nnodes 1 --nproc_per_node 2 --master_addr 127.0.0.1 --master_port 0 {file} {args}"
        subprocess.run(line.format(file=__file__, args=" ".join(sys.argv[1:])).split(), check=True)
    else:
        from .train.tuner import run_exp
        print(command)
        run_exp()
"""
TUNER = """
import os, sys

def run_exp():
    with open(os.environ["SEEN"] + os.environ.get("RANK", ""), "w") as seen:
        print("TargetFinder" in [type(finder).__name__ for finder in sys.meta_path], *sys.argv[1:], file=seen)
"""
# As on a machine with two GPUs.
MISC = """
import os

def is_env_enabled(name):
    return name in os.environ

def get_device_count():
    return 2
"""
TORCHRUN = """#!{python}
from torch.distributed.run import main

main()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    files = {
        "__init__.py": "",
        "launcher.py": LAUNCHER,
        "cli.py": "from .launcher import launch as main\n",
        "extras/__init__.py": "",
        "extras/misc.py": MISC,
        "train/__init__.py": "",
        "train/tuner.py": TUNER,
    }
    for name, text in files.items():
        path = tmp_path / "llamafactory" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture(scope="module")
def environment(make_environment: Callable[[str], Any]) -> Any:
    """An environment with no plugin installed, so that nothing but ``__main__`` can bring the hooks."""
    environment = make_environment("main")
    torchrun = environment.folder / "bin" / "torchrun"
    torchrun.write_text(TORCHRUN.format(python=environment.folder / "bin" / "python"))
    torchrun.chmod(0o755)
    return environment


def run(environment: Any, root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    variables |= {"PYTHONPATH": os.pathsep.join([str(root), str(REPOSITORY)]), "SEEN": str(root / "seen")}
    # A PATH without the environment's own folder: its torchrun has to be found all the same.
    variables |= {"PATH": os.defpath}
    return environment.run("bin/python", "-m", "chatreid_plugin", *arguments, check=False, **variables)


@pytest.mark.parametrize("command", ["train", "api"])
def test_llamafactory_runs_with_the_hooks_when_its_command_is_given(
    environment: Any, stand_in: Path, command: str
) -> None:
    result = run(environment, stand_in, command, "X.yaml", "seed=1")
    assert (result.returncode, result.stdout) == (0, f"{command}\n"), result.stderr
    assert (stand_in / "seen").read_text() == "True X.yaml seed=1\n"


def test_hooks_are_left_out_when_switched_off(environment: Any, stand_in: Path) -> None:
    assert run(environment, stand_in, "train", "X.yaml", CHATREID_PLUGIN="0").returncode == 0
    assert (stand_in / "seen").read_text() == "False X.yaml\n"


@pytest.mark.slow
def test_torchrun_children_have_the_hooks(environment: Any, stand_in: Path) -> None:
    result = run(environment, stand_in, "train", "X.yaml", "seed=1", FORCE_TORCHRUN="1")
    assert result.returncode == 0, result.stderr
    assert [(stand_in / f"seen{rank}").read_text() for rank in (0, 1)] == ["True X.yaml seed=1\n"] * 2


def test_unknown_way_of_launching_is_refused(environment: Any, stand_in: Path) -> None:
    (stand_in / "llamafactory" / "launcher.py").write_text("def launch():\n    print('launched')\n")
    result = run(environment, stand_in, "train", "X.yaml")
    assert (result.returncode, result.stdout) == (4, "")
    assert "use llamafactory-cli" in result.stderr


def test_installed_llamafactory_launches_as_the_stand_in_does() -> None:
    folder = importlib.util.find_spec("llamafactory").submodule_search_locations[0]  # type: ignore[union-attr,index]
    text = (Path(folder) / "launcher.py").read_text()
    assert "file_name=__file__" in text
    assert "{file_name} {args}" in text
    assert ".split()," in text


def test_other_commands_go_to_the_chatreid_command_line(environment: Any, stand_in: Path) -> None:
    assert run(environment, stand_in, "--version").stdout == f"chatreid-plugin {chatreid_plugin.__version__}\n"

"""Throwaway virtual environments that see the packages of the environment which runs the tests.

A folder named by a ``.pth`` file joins ``sys.path``, but the ``.pth`` files inside it are not processed: this
environment's own installation of the plugin, if any, is therefore not at work in the throwaway ones.
"""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


HIDDEN = ("CHATREID_PLUGIN", "FORCE_TORCHRUN", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
# pip sees this environment's own installation, which it cannot touch, as already there: --force-reinstall.
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation", "--no-compile", "--force-reinstall")


@dataclass(frozen=True)
class Environment:
    folder: Path

    @property
    def packages(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def run(
        self, program: str, *arguments: str | Path, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return run(self.folder / program, *arguments, check=check, **environment)

    def execute(self, code: str, **environment: str) -> str:
        return self.run("bin/python", "-c", code, **environment).stdout.strip()

    def pip(self, *arguments: str | Path) -> None:
        python = self.folder / "bin" / "python"
        run(Path(sys.executable), "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments)

    def install(self, *what: str | Path) -> None:
        self.pip("install", *OFFLINE, *what)


def run(
    program: Path, *arguments: str | Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    clean = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    result = subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, timeout=200, check=False, cwd="/"
    )
    assert not check or result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Environment]:
    def make(name: str) -> Environment:
        environment = Environment(tmp_path_factory.mktemp(name))
        run(Path(sys.executable), "-m", "venv", "--without-pip", environment.folder)
        (environment.packages / "zz_parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return environment

    return make

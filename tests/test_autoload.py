"""The finder, in interpreters of their own, with a copy of the package and stand-ins for LLaMA-Factory's modules."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import chatreid_plugin
from chatreid_plugin._autoload import TARGETS


PACKAGE = Path(chatreid_plugin.__file__).parent
HOOKS = "def apply(name, module, *hook):\n    print('hook', name, module.VALUE)\n"
TARGET = "llamafactory.data.loader"
AUTOLOAD = "import chatreid_plugin._autoload as autoload\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A path entry with the plugin's loading part, hooks that print, and every target module."""
    (tmp_path / "chatreid_plugin" / "training").mkdir(parents=True)
    for name in ("__init__.py", "_autoload.py", "errors.py", "printing.py"):
        shutil.copy(PACKAGE / name, tmp_path / "chatreid_plugin")
    write(tmp_path, "chatreid_plugin.training.hooks", HOOKS)
    for name in TARGETS:
        write(tmp_path, name, "VALUE = 1\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in path.relative_to(root).parents[:-1]:
        (root / folder / "__init__.py").touch()
    path.write_text(text)


def run(root: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # -S: no site-packages, so neither an installed plugin nor third-party modules; -P: not the current folder.
    clean = {name: value for name, value in os.environ.items() if name != "CHATREID_PLUGIN"}
    return subprocess.run(
        [sys.executable, "-S", "-P", "-c", code],
        env=clean | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_well(root: Path, code: str, **environment: str) -> str:
    result = run(root, code, **environment)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_hook_is_called_once_after_the_module_has_executed(root: Path, target: str) -> None:
    write(root, target, "print('executed')\nVALUE = 2\n")
    assert run_well(root, f"{AUTOLOAD}import {target}\nimport {target}") == f"executed\nhook {target} 2\n"


def test_hook_is_called_before_the_importing_module_binds_a_name(root: Path) -> None:
    write(root, "chatreid_plugin.training.hooks", "def apply(name, module, *hook):\n    module.VALUE = 'patched'\n")
    assert run_well(root, f"{AUTOLOAD}from {TARGET} import VALUE\nprint(VALUE)") == "patched\n"


def test_other_modules_are_left_alone(root: Path) -> None:
    write(root, "llamafactory.data.other", "VALUE = 1\n")
    assert run_well(root, f"{AUTOLOAD}import llamafactory.data.other, json") == ""


def test_start_imports_nothing_else(root: Path) -> None:
    code = "import os, sys\nbefore = set(sys.modules)\nimport chatreid_plugin._autoload\n"
    added = set(run_well(root, f"{code}print(*(set(sys.modules) - before))").split())
    assert added <= {"chatreid_plugin", "chatreid_plugin._autoload", "__future__"}


def test_module_keeps_its_own_loader_and_source(root: Path) -> None:
    code = f"""{AUTOLOAD}
import importlib.util, inspect, pickle, copy
spec = importlib.util.find_spec("{TARGET}")
print(spec.loader.get_source("{TARGET}"), end="")
copy.copy(spec.loader)
import {TARGET} as module
print(type(module.__spec__.loader).__name__, module.__loader__ is module.__spec__.loader)
print(inspect.getsource(module), end="")
"""
    expected = f"VALUE = 1\nhook {TARGET} 1\nSourceFileLoader True\nVALUE = 1\n"
    assert run_well(root, code) == expected


def test_resources_are_found_when_a_target_is_a_package(root: Path) -> None:
    target = root.joinpath(*TARGET.split("."))
    target.with_suffix(".py").unlink()
    write(root, f"{TARGET}.inside", "")
    (target / "__init__.py").write_text("VALUE = 1\n")
    (target / "note.txt").write_text("found")
    code = f"{AUTOLOAD}import importlib.resources\nprint(importlib.resources.files('{TARGET}').joinpath('note.txt')"
    assert run_well(root, f"{code}.read_text())").endswith("found\n")


def test_search_ends_when_another_finder_asks_every_finder(root: Path) -> None:
    code = f"""{AUTOLOAD}
import sys
class Other:
    def find_spec(self, *search):
        found = (finder.find_spec(*search) for finder in sys.meta_path if finder is not self)
        return next(filter(None, found), None)
sys.meta_path.insert(0, Other())
import {TARGET}
"""
    assert run_well(root, code) == f"hook {TARGET} 1\n"


def test_import_goes_on_and_says_so_once_when_a_hook_fails(root: Path) -> None:
    write(
        root, "chatreid_plugin.training.hooks", "def apply(name, module, *hook):\n    raise RuntimeError('broken')\n"
    )
    result = run(root, f"{AUTOLOAD}import {TARGET}\nprint({TARGET}.VALUE, autoload.ERRORS)")
    assert result.stdout == f"1 {{'{TARGET}': 'RuntimeError: broken'}}\n"
    assert result.stderr.count("\n") == 1
    assert TARGET in result.stderr
    assert "chatreid doctor" in result.stderr


def test_foreseen_fault_is_recorded_in_silence(root: Path) -> None:
    hooks = "from ..errors import UpstreamError\ndef apply(name, module, *hook):\n    raise UpstreamError('drifted')\n"
    write(root, "chatreid_plugin.training.hooks", hooks)
    output = run_well(root, f"{AUTOLOAD}import {TARGET}\nprint({TARGET}.VALUE, autoload.ERRORS['{TARGET}'])")
    assert output == "1 UpstreamError: drifted\n"


@pytest.mark.parametrize("deleted", [["training/hooks.py"], ["training"], ["training", "errors.py"]])
def test_import_goes_on_when_half_the_package_is_deleted(root: Path, deleted: list[str]) -> None:
    for name in deleted:
        path = root / "chatreid_plugin" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = run(root, f"{AUTOLOAD}import {TARGET}\nprint({TARGET}.VALUE, list(autoload.ERRORS))")
    assert (result.returncode, result.stdout) == (0, f"1 ['{TARGET}']\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("value", ["0", "false", "OFF", " no "])
def test_nothing_is_installed_when_switched_off(root: Path, value: str) -> None:
    code = f"{AUTOLOAD}import {TARGET}\nautoload.install()\nprint(autoload.is_installed())"
    assert run_well(root, code, CHATREID_PLUGIN=value) == "False\n"
    assert run_well(root, code, CHATREID_PLUGIN="1") == f"hook {TARGET} 1\nTrue\n"


def test_one_finder_is_installed_when_installed_again(root: Path) -> None:
    code = f"""{AUTOLOAD}
import importlib, sys
autoload.install()
importlib.reload(autoload)
print(sum(type(finder).__name__ == "TargetFinder" for finder in sys.meta_path))
import {TARGET}
"""
    assert run_well(root, code) == f"1\nhook {TARGET} 1\n"


def test_hook_is_called_when_the_target_is_already_imported(root: Path) -> None:
    code = f"import {TARGET}\nprint('imported')\n{AUTOLOAD}print(autoload.ERRORS)"
    assert run_well(root, code) == f"imported\nhook {TARGET} 1\n{{}}\n"


def test_hook_is_called_again_when_the_target_is_reloaded(root: Path) -> None:
    code = f"{AUTOLOAD}import importlib, {TARGET}\nimportlib.reload({TARGET})"
    assert run_well(root, code) == f"hook {TARGET} 1\n" * 2


def test_error_of_the_target_itself_reaches_its_importer(root: Path) -> None:
    write(root, TARGET, "raise ValueError('its own')\n")
    result = run(root, f"{AUTOLOAD}import {TARGET}")
    assert result.returncode == 1
    assert "ValueError: its own" in result.stderr
    assert "hook" not in result.stdout

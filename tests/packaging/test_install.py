"""The wheel and the editable installation, in throwaway environments (see conftest.py)."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


# One worker builds the wheel once (`--dist loadgroup` in the Makefile).
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = ("examples/stage2.yaml", "eval/market1501.yaml", "dataset_info/dataset_info.json")
Environment = Any  # conftest.py's class: test folders are no packages, so it cannot be imported
MakeEnvironment = Callable[[str], Environment]
IS_LOADED = "import sys; print('chatreid_plugin._autoload' in sys.modules)"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=REPOSITORY, check=True
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, make_environment: MakeEnvironment) -> Environment:
    environment = make_environment("installed")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def editable(make_environment: MakeEnvironment) -> Environment:
    environment = make_environment("editable")
    environment.install("--editable", REPOSITORY)
    return environment


def test_wheel_holds_the_loading_files_and_the_recipes_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"chatreid_autoload.pth", "chatreid_autoload.start", "chatreid_plugin/_autoload.py"} <= set(names)
    assert {f"chatreid_plugin/resources/{name}" for name in SHIPPED} <= set(names)
    assert not any("/autoload/" in name for name in names)
    roots = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert roots == {"chatreid_plugin", "chatreid_autoload.pth", "chatreid_autoload.start"}
    assert {Path(name).name for name in names if "resources/dataset_info/" in name} == {
        "README.md",
        "dataset_info.json",
    }


@pytest.mark.parametrize("kind", ["installed", "editable"])
def test_every_interpreter_loads_the_plugin(kind: str, request: pytest.FixtureRequest) -> None:
    environment: Environment = request.getfixturevalue(kind)
    assert (environment.packages / "chatreid_autoload.pth").is_file()
    assert environment.execute(IS_LOADED) == "True"
    place = environment.execute("import chatreid_plugin; print(chatreid_plugin.__file__)")
    assert Path(place).is_relative_to(environment.packages if kind == "installed" else REPOSITORY)


@pytest.mark.parametrize("kind", ["installed", "editable"])
def test_init_copies_the_recipes(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    environment: Environment = request.getfixturevalue(kind)
    environment.run("bin/chatreid", "init", tmp_path)
    for name in SHIPPED:
        assert (tmp_path / name).read_bytes() == (REPOSITORY / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset_info", "eval", "examples"]


def test_stock_command_knows_our_keys(installed: Environment) -> None:
    shown = installed.run("bin/python", "-m", "llamafactory.cli", "train", "-h").stdout
    assert "--chatreid_stage" in shown
    assert "--chatreid_encoder" in shown


def test_stock_command_is_stock_when_switched_off(installed: Environment) -> None:
    code = (
        "import dataclasses, llamafactory.hparams.parser as parser\n"
        "fields = {field.name for kind in parser._TRAIN_ARGS for field in dataclasses.fields(kind)}\n"
        "print('cutoff_len' in fields, any(name.startswith('chatreid') for name in fields))"
    )
    assert installed.execute(code, CHATREID_PLUGIN="0").endswith("True False")


def test_uninstalling_leaves_nothing(wheel: Path, make_environment: MakeEnvironment) -> None:
    environment = make_environment("throwaway")
    before = sorted(environment.packages.iterdir())
    environment.install(wheel)
    assert sorted(environment.packages.iterdir()) != before
    environment.pip("uninstall", "--yes", "chatreid-plugin")
    assert sorted(environment.packages.iterdir()) == before
    assert environment.execute(IS_LOADED) == "False"


def test_torch_still_works_when_the_package_is_deleted_and_the_pth_left(
    wheel: Path, make_environment: MakeEnvironment
) -> None:
    environment = make_environment("throwaway")
    environment.install(wheel)
    shutil.rmtree(environment.packages / "chatreid_plugin")
    result = environment.run("bin/python", "-c", "import torch; print(torch.ones(2).sum().item())")
    assert result.stdout == "2.0\n"
    # `site` says so and goes on; Python 3.11 reads the .pth files of a virtual environment twice.
    assert "chatreid_autoload.pth" in result.stderr
    assert "No module named 'chatreid_plugin'" in result.stderr

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chatreid_plugin import upstream
from chatreid_plugin.errors import UpstreamError
from chatreid_plugin.training import compat
from chatreid_plugin.training.compat import ARGUMENT_LISTS, USED_NAMES, WRAPPED_FUNCTIONS, UpstreamFunction


CODE = Path(compat.__file__).parent


@pytest.mark.parametrize("function", WRAPPED_FUNCTIONS, ids=lambda f: f"{f.module}.{f.name}")
def test_wrapped_function_exists_with_these_parameters(function: UpstreamFunction) -> None:
    value: Any = importlib.import_module(function.module)
    for part in function.name.split("."):
        value = getattr(value, part)
    # Our wrappers keep the original's signature (functools.wraps), so this sees upstream's own.
    assert tuple(inspect.signature(value).parameters) == function.parameters


@pytest.mark.parametrize("module", USED_NAMES)
def test_used_names_exist(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in USED_NAMES[module]:
        compat.get_upstream(loaded, name)  # raises if it is gone; a value may be None


def test_argument_lists_hold_the_data_arguments() -> None:
    """Upstream's order is what get_train_args unpacks; we replace one entry in place."""
    parser = importlib.import_module("llamafactory.hparams.parser")
    for name in ARGUMENT_LISTS:
        classes = [cls.__name__ for cls in getattr(parser, name)]
        assert name == "_TRAIN_MCA_ARGS" or classes[:2] == ["ModelArguments", "ChatReIDDataArguments"]
    assert len(parser._TRAIN_ARGS) == 5


def list_asked_names() -> set[str]:
    """Return every literal name that the package asks get_function or get_upstream for."""
    names: set[str] = set()
    for path in (*CODE.glob("*.py"), *CODE.parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
                last = node.args[1]
                if node.func.id in ("get_function", "get_upstream") and isinstance(last, ast.Constant):
                    names.add(str(last.value))
    return names


def test_every_name_asked_for_is_listed() -> None:
    listed = {f.name for f in WRAPPED_FUNCTIONS} | {name for names in USED_NAMES.values() for name in names}
    asked = list_asked_names()
    assert "align_dataset" in asked
    assert asked <= listed
    assert {f.name for f in WRAPPED_FUNCTIONS} <= asked


@pytest.fixture
def drifted() -> ModuleType:
    module = ModuleType("llamafactory.data.loader")
    exec("def align_dataset(dataset, attributes): ...", module.__dict__)
    return module


def test_drifted_signature_names_both_versions(drifted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "find_version", lambda package: "0.9.9")
    with pytest.raises(UpstreamError) as caught:
        compat.get_function(drifted, "align_dataset")
    text = str(caught.value)
    assert "of llamafactory 0.9.9 takes (dataset, attributes)" in text
    assert "0.9.5" in text and "(dataset, dataset_attr, data_args, training_args)" in text
    assert caught.value.exit_code == 4


def test_missing_name_names_both_versions(drifted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "find_version", lambda package: "0.9.9")
    with pytest.raises(
        UpstreamError, match=r"0\.9\.9 has no llamafactory\.data\.loader\._load_single_dataset.*0\.9\.5"
    ):
        compat.get_function(drifted, "_load_single_dataset")


def test_version_is_unknown_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise upstream.PackageNotFoundError(name)

    assert upstream.find_version("llamafactory") != "unknown"
    monkeypatch.setattr(upstream, "version", fail)
    assert upstream.find_version("llamafactory") == "unknown"

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from chatreid_plugin import _autoload, doctor
from chatreid_plugin.errors import ConfigError, DataError, UpstreamError
from chatreid_plugin.training import compat, hooks


@pytest.fixture
def clean_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "STATUS", {})
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: print("stock", kind.__name__))


def test_every_target_of_the_finder_has_a_hook_and_every_wrapped_function_a_target() -> None:
    for name, function in _autoload.TARGETS.values():
        assert name and callable(hooks._find_hook(function))
    modules = {function.module for function in compat.WRAPPED_FUNCTIONS}
    assert {module for module in modules if module.startswith("llamafactory.")} <= set(_autoload.TARGETS)


@pytest.mark.usefixtures("clean_status")
def test_status_goes_from_pending_to_applied_or_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: ModuleType) -> None:
        raise UpstreamError("drifted")

    assert {row.state for row in doctor._list_hooks()} == {"pending"}
    found: dict[str, Callable[[ModuleType], None]] = {
        "loader.extend_loader": lambda module: None,
        "model.extend_model_loader": fail,
    }
    monkeypatch.setattr(hooks, "_find_hook", found.__getitem__)
    for target in ("llamafactory.data.loader", "llamafactory.model.loader"):
        _autoload._apply_hook(target, ModuleType("a"))
    assert _autoload.ERRORS.pop("llamafactory.model.loader") == "UpstreamError: drifted"
    states = {row.target: (row.state, row.reason) for row in doctor._list_hooks()}
    assert states["llamafactory.data.loader"] == ("applied", "")
    assert states["llamafactory.model.loader"] == ("failed", "UpstreamError: drifted")
    assert states["llamafactory.data.template"] == ("pending", "")
    assert len(states) == len(_autoload.TARGETS)


@pytest.mark.usefixtures("clean_status")
def test_own_errors_are_one_line_and_others_go_to_the_previous_hook(capsys: pytest.CaptureFixture[str]) -> None:
    hooks._show_user_errors_briefly()
    installed = sys.excepthook
    hooks._show_user_errors_briefly()
    assert sys.excepthook is installed
    sys.excepthook(ConfigError, ConfigError("set freeze_vision_tower: false"), None)
    sys.excepthook(KeyError, KeyError("x"), None)
    output = capsys.readouterr()
    assert output.err == "chatreid: ConfigError: set freeze_vision_tower: false\n"
    assert output.out == "stock KeyError\n"


@pytest.mark.usefixtures("clean_status")
def test_error_of_a_data_loader_worker_is_shown_without_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    from torch._utils import ExceptionWrapper

    hooks._show_user_errors_briefly()
    try:
        raise DataError("Image a.jpg is damaged")
    except DataError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(DataError) as caught:
        wrapped.reraise()
    assert "Traceback" in str(caught.value)
    sys.excepthook(DataError, caught.value, None)
    assert capsys.readouterr().err == "chatreid: DataError: Image a.jpg is damaged\n"


BROKEN_HOOKS = """
import dataclasses, sys
from chatreid_plugin.training import compat

def drift(function):
    broken = function.name in ("get_train_args", "init_adapter")
    return dataclasses.replace(function, parameters=("self",)) if broken else function

compat.WRAPPED_FUNCTIONS = tuple(map(drift, compat.WRAPPED_FUNCTIONS))
from chatreid_plugin import doctor
from datasets import Dataset
from llamafactory.data import loader
from llamafactory.data.parser import DatasetAttr
from llamafactory.hparams import get_train_args
_, data_args, training_args, finetuning_args, _ = get_train_args(dict(
    model_name_or_path="any", output_dir=sys.argv[1], template="qwen2_vl", dataset="any", stage="sft", do_train=True,
    use_cpu=True, report_to="none",
))
print("parsed", data_args.template, type(data_args).__name__)
rows = Dataset.from_list([{"instruction": "a", "input": "", "output": "b"}])
attributes = DatasetAttr("file", dataset_name="any")
# The hook of the loader is at work, without the keys that it reads.
print("aligned", hasattr(loader.align_dataset, "__wrapped__"),
      len(loader.align_dataset(rows, attributes, data_args, training_args)))
report = doctor.examine()
print(report.render())
sys.exit(report.exit_code)
"""


@pytest.mark.slow
def test_stock_training_works_and_doctor_reports_when_hooks_fail(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BROKEN_HOOKS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 4, result.stderr
    assert "parsed qwen2_vl DataArguments" in result.stdout
    assert "aligned True 1" in result.stdout
    assert (
        "failed   YAML keys chatreid_* and the decoder swap (llamafactory.hparams.parser): Upstream" in result.stdout
    )
    hook = "check of the trainable parameters, batched vision attention (llamafactory.model.loader)"
    assert f"failed   {hook}: UpstreamError" in result.stdout
    assert result.stdout.count("applied") == len(_autoload.TARGETS) - 2
    assert "2 problem(s)" in result.stdout
    assert "is not extended" not in result.stderr  # foreseen: for the doctor, not for every user of LLaMA-Factory

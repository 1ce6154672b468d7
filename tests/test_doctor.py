import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chatreid_plugin import _autoload, doctor
from chatreid_plugin.cli import app
from chatreid_plugin.doctor import HookRow, Report
from chatreid_plugin.training.recipe import Finding


RunCommand = Callable[..., subprocess.CompletedProcess[str]]
HEALTHY = Report(
    plugin="0.1.0",
    python="3.11.7",
    executable="/env/bin/python",
    versions={"torch": "2.11.0", "deepspeed": None},
    autoload_file="/env/chatreid_autoload.pth",
    autoload_active=True,
    switched_off=False,
    hooks=(HookRow("formatting", "llamafactory.data.converter", "applied", ""),),
    torchrun="/env/bin/torchrun",
    gpus=(),
    problems=(),
    warnings=(),
)


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"torch": "2.11.0", "transformers": "5.5.4"}, []),
        ({"torch": "2.11.0+cu130", "transformers": "5.5.4"}, []),
        ({"torch": "2.15.0", "transformers": "5.5.4"}, ["torch 2.15.0"]),
        ({"torch": "2.11.0", "transformers": "5.6.0"}, ["transformers 5.6.0"]),
        ({"torch": "2.7.1", "transformers": "5.6.0"}, ["torch 2.7.1", "transformers 5.6.0"]),
        ({"torch": "2.11.0"}, ["transformers is not installed"]),
    ],
)
def test_bounds_name_each_package_outside_them(versions: dict[str, str], expected: list[str]) -> None:
    requirements = ["torch<2.12,>=2.8", "transformers!=5.6.0", "timm; extra == 'baselines'"]
    problems = doctor.check_bounds(requirements, versions.get)
    assert len(problems) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True))


def test_torchrun_of_another_environment_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "bin")
    assert doctor.check_torchrun(str(tmp_path / "bin" / "torchrun"), str(tmp_path / "link")) == []
    assert "another environment" in doctor.check_torchrun("/elsewhere/torchrun", str(tmp_path))[0]
    assert "not on PATH" in doctor.check_torchrun(None, str(tmp_path))[0]


def test_failed_hook_is_a_problem_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_autoload, "ERRORS", {"second": "RuntimeError: recorded"})
    rows = [HookRow("a", "first", "failed", "own reason"), HookRow("b", "second", "failed", "")]
    assert doctor.check_hooks(rows, switched_off=False) == [
        "hook failed: a (first): own reason",
        "hook failed: b (second): RuntimeError: recorded",
    ]


@pytest.mark.parametrize(("target", "off", "count"), [("json", False, 1), ("json", True, 0), ("not.there", False, 0)])
def test_pending_hook_is_a_problem_when_its_module_is_loaded(target: str, off: bool, count: int) -> None:
    assert len(doctor.check_hooks([HookRow("a", target, "pending", "")], switched_off=off)) == count


def test_exit_code_is_4_when_there_is_a_problem() -> None:
    assert HEALTHY.exit_code == 0
    assert replace(HEALTHY, warnings=("w",)).exit_code == 0
    assert replace(HEALTHY, problems=("p",)).exit_code == 4


def test_text_shows_hooks_and_findings() -> None:
    report = replace(
        HEALTHY,
        hooks=(HookRow("formatting", "a.b", "failed", "why"),),
        switched_off=True,
        problems=("broken",),
        warnings=("odd",),
    )
    text = report.render()
    for expected in (
        "failed   formatting (a.b): why",
        "switched off",
        "warning: odd",
        "problem: broken",
        "torch 2.11.0",
    ):
        assert expected in text
    assert text.endswith("1 problem(s)")
    assert HEALTHY.render().endswith("healthy")


def test_json_holds_the_whole_report() -> None:
    report = json.loads(HEALTHY.to_json())
    assert report["healthy"] is True
    assert report["hooks"] == [
        {"name": "formatting", "target": "llamafactory.data.converter", "state": "applied", "reason": ""}
    ]
    assert report["versions"] == {"torch": "2.11.0", "deepspeed": None}


def test_findings_of_a_recipe_are_shown_and_decide_the_exit_code() -> None:
    findings = Finding("stage", "ok", "2"), Finding("data", "warning", "odd")
    warned = replace(HEALTHY, recipe="a.yaml", findings=findings)
    assert (warned.exit_code, warned.render().splitlines()[-1]) == (0, "healthy")
    assert "recipe a.yaml:\n  ok       stage: 2\n  warning  data: odd" in warned.render()
    failed = replace(warned, findings=(*warned.findings, Finding("memory", "error", "too much", "Buy a GPU")))
    assert (failed.exit_code, failed.render().splitlines()[-1]) == (4, "1 problem(s)")
    report = json.loads(failed.to_json())
    assert (report["healthy"], report["recipe"]) == (False, "a.yaml")
    assert report["findings"][-1] == {
        "check": "memory",
        "state": "error",
        "found": "too much",
        "advice": "Buy a GPU",
    }
    assert "findings" not in json.loads(HEALTHY.to_json())


def test_recipe_is_not_looked_at_where_the_plugin_is_not_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(HEALTHY, hooks=(HookRow("formatting", "a.b", "pending", ""),))
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    report = doctor.examine_with_recipe(tmp_path / "a.yaml", [], None)
    assert report.exit_code == 4
    assert "not at work here" in report.findings[0].found
    monkeypatch.setattr(doctor, "examine", lambda: HEALTHY)
    assert "does not exist" in doctor.examine_with_recipe(tmp_path / "a.yaml", [], None).findings[0].found


@pytest.mark.parametrize("arguments", [["a=1"], ["--compare", "eval.yaml"]])
def test_overrides_need_a_recipe(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 2
    assert "--yaml" in result.output


def test_autoload_file_is_searched_where_packages_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    # A checkout on the path holds the file inside the package, where it does nothing.
    monkeypatch.setattr(sys, "path", [str(Path(doctor.__file__).parents[1]), str(tmp_path)])
    assert doctor.find_autoload_file() is None
    (tmp_path / "chatreid_autoload.pth").touch()
    assert doctor.find_autoload_file() == str(tmp_path / "chatreid_autoload.pth")


def test_failed_import_of_a_target_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raises_at_import.py").write_text("raise OSError('no libcudart')\n")
    monkeypatch.syspath_prepend(tmp_path)
    problems = doctor._import_targets(["json", "raises_at_import"])
    assert problems == ["raises_at_import cannot be imported: OSError: no libcudart"]


@pytest.mark.slow
def test_every_hook_is_applied_and_stdout_is_json_alone(run_command: RunCommand) -> None:
    result = run_command([sys.executable, "-m", "chatreid_plugin", "doctor", "--json"])
    report = json.loads(result.stdout)
    assert {row["target"] for row in report["hooks"]} == set(_autoload.TARGETS)
    assert {row["state"] for row in report["hooks"]} == {"applied"}, result.stdout
    assert (result.returncode, report["problems"]) == (0, [])


@pytest.mark.slow
def test_recipe_with_a_fault_gives_exit_code_4_and_json_alone(
    run_command: RunCommand, workshop: Any, tmp_path: Path
) -> None:
    values = workshop.list_overrides(1, tmp_path / "out", freeze_vision_tower=True)
    overrides = [f"{key}={'null' if value is None else value}" for key, value in values.items()]
    result = run_command(
        [sys.executable, "-m", "chatreid_plugin", "doctor", "--yaml", "examples/stage1.yaml", *overrides, "--json"]
    )
    report = json.loads(result.stdout)
    assert result.returncode == 4
    assert [finding["check"] for finding in report["findings"] if finding["state"] == "error"] == ["stage"]
    assert not (tmp_path / "out").exists()

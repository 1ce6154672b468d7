"""Tests of python -m chatreid_plugin.eval: output, exit codes, and the YAML files that are shipped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from chatreid_plugin.config import load_settings
from chatreid_plugin.datasets.registry import list_benchmarks
from chatreid_plugin.eval import __main__ as command
from chatreid_plugin.eval.__main__ import main
from chatreid_plugin.eval.distributed import Processes
from chatreid_plugin.eval.settings import EvalSettings


MakeWorld = Callable[..., Path]

YAMLS = sorted((Path(__file__).parents[2] / "eval").glob("*.yaml"))


@pytest.fixture
def config(make_world: MakeWorld, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    lines = [f"data: {{benchmark: folder, manifest: {make_world()}}}", "scoring: {backend: oracle}"]
    lines += ["filter: {source: colour}", f"output: {{output_dir: {tmp_path / 'out'}}}"]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_shipped_yaml_is_valid_and_launches_itself(path: Path) -> None:
    settings = load_settings(path, [], EvalSettings)
    assert path.stem.startswith(settings.data.benchmark)
    text = path.read_text()
    assert f"python -m chatreid_plugin.eval eval/{path.name}" in text
    lines = [line for line in text.splitlines() if line]
    assert path.stem == "market1501" or 6 <= len(lines) <= 12
    for line in text.splitlines():
        if line.startswith("# python"):
            load_settings(path, [word for word in line.split() if "=" in word], EvalSettings)


def test_there_is_a_yaml_for_each_protocol() -> None:
    assert {load_settings(path, [], EvalSettings).data.benchmark for path in YAMLS} == set(list_benchmarks())


def test_prints_a_table_and_writes_the_files(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config)]) == 0
    output = capsys.readouterr().out
    assert "mAP          100.00" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("scores-")) == [
        ".lock",
        "rankings.parquet",
        "report.html",
        "results.json",
        "run.json",
    ]


def test_json_prints_json_alone(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config), "--json", "filter.top_k=5"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["settings"]["filter"]["top_k"] == 5
    assert content == json.loads((tmp_path / "out" / "results.json").read_text())


def test_dry_run_speaks_once_when_torchrun_starts_several(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["--dry-run", str(config)]) == 0
    assert capsys.readouterr().out == ""


def test_config_alone_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err.endswith("the following arguments are required: CONFIG.yaml | key=value\n")


def test_dry_run_writes_nothing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", str(config), "data.max_queries=3"]) == 0
    assert "3 queries" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_unknown_key_is_one_clear_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config), "filter.topk=5"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("Error:") == 1
    assert "filter.topk: unknown key; did you mean filter.top_k?" in captured.err
    assert "Traceback" not in captured.err


def test_missing_configuration_is_a_configuration_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml does not exist" in capsys.readouterr().err


def test_file_in_place_of_the_output_folder_is_a_configuration_error(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    assert main([str(config), f"output.output_dir={tmp_path / 'taken'}"]) == 2
    assert "taken is a file. Set another output_dir." in capsys.readouterr().err


def test_missing_manifest_is_a_data_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config), "data.manifest=absent.parquet"]) == 3
    assert "absent.parquet does not exist" in capsys.readouterr().err


def test_query_without_a_match_is_named_with_its_reason(
    config: Path, make_world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    make_world([("query", "1", "1"), ("gallery", "1", "1")])
    assert main([str(config)]) == 3
    message = capsys.readouterr().err
    assert "only seen by the query's own camera 1" in message
    assert "data.camera_rule=false" in message


def test_interruption_shows_the_line_that_resumes(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(evaluations: list[EvalSettings], processes: Processes) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_evaluations", interrupt)
    assert main([str(config), "filter.top_k=5", "output.overwrite=true"]) == 130
    line = f"python -m chatreid_plugin.eval {config} filter.top_k=5 output.overwrite=false"
    assert line in capsys.readouterr().err

"""Tests of the commands `chatreid list`, `inspect` and `synth`."""

import json
import sys
from pathlib import Path

import pytest

from chatreid_plugin import cli
from chatreid_plugin.datasets.catalog import read_catalog
from chatreid_plugin.engine.inspect import render_catalog, render_entry
from chatreid_plugin.errors import ConfigError, DataError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["chatreid", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_list_prints_the_table_or_one_entry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "list") == 0
    assert capsys.readouterr().out == render_catalog() + "\n"
    assert run(monkeypatch, "list", "viper") == 0
    assert capsys.readouterr().out == render_entry("viper") + "\n"


def test_list_prints_json_and_nothing_else_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "list", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)) == list(read_catalog())
    assert run(monkeypatch, "list", "--json", "VIPeR") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "viper"


def test_synthetic_set_is_written_and_inspected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(tmp_path / "peta")
    assert run(monkeypatch, "synth", "peta", folder, "--seed", "3") == 0
    assert capsys.readouterr().out == f"6 labelled images. Next: chatreid inspect peta {folder}\n"
    assert run(monkeypatch, "inspect", "peta", folder, "--trial", "2") == 0
    assert capsys.readouterr().out.startswith(f"peta, trial 2: {folder}\n\nSPLIT ")
    assert run(monkeypatch, "inspect", "peta", folder, "--json") == 0
    assert [split["split"] for split in json.loads(capsys.readouterr().out)["splits"]] == ["train", "val", "gallery"]


def test_inspect_hands_variant_and_pattern_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(tmp_path / "set")
    assert run(monkeypatch, "synth", "celebreid:light", folder) == 0
    assert run(monkeypatch, "inspect", "celebreid", folder, "--variant", "light") == 0
    assert "celebreid, variant light" in capsys.readouterr().out
    pattern = "{_part}/{split}/{person}_{camera}_0.jpg"
    assert run(monkeypatch, "inspect", "pattern", folder, "--pattern", pattern) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{split} " in shown for split in ("train", "query", "gallery"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["list", "nothing"], ConfigError.exit_code, "There is no data set 'nothing'"),
        (["list", "--json", "Occluded-Duke"], ConfigError.exit_code, "withdrew it in 2019"),
        (["inspect", "DukeMTMC-reID", "."], ConfigError.exit_code, "withdrew it in 2019"),
        (["inspect", "market1501", "raw/DukeMTMC-reID"], ConfigError.exit_code, "withdrew it in 2019"),
        (["inspect", "viper", "no-such-folder"], DataError.exit_code, "no-such-folder does not exist"),
        (["inspect", "viper", ".", "--trial", "0"], 2, "--trial"),
        (["synth", "duke", "new"], ConfigError.exit_code, "There is no synthetic layout 'duke'"),
    ],
)
def test_wrong_use_is_one_message_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert list(tmp_path.iterdir()) == []


def test_parse_refuses_duke(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "build.yaml"
    config.write_text("sources:\n- {name: dukemtmcreid, root: raw}\nrecords: {stage1: 10}\n")
    assert run(monkeypatch, "parse", str(config)) == ConfigError.exit_code
    assert "withdrew it in 2019" in capsys.readouterr().err


def test_synth_refuses_a_folder_that_is_not_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert run(monkeypatch, "synth", "viper", str(tmp_path)) == DataError.exit_code
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

"""Tests of `chatreid filter` and `chatreid audit` as commands: exit codes, and what they print and write."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from chatreid_plugin import cli
from chatreid_plugin.demo.world import write_world


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Return a recipe over a small world of 4 + 2 people; its manifest is made."""
    write_world(tmp_path / "world", train_people=4, test_people=2, cameras=2, images_per_camera=2)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"sources:\n- {{name: market1501, root: {tmp_path}/world, allow_count_mismatch: true}}\n"
        f"manifest_dir: {tmp_path}/manifests\nrecords: {{stage1: 10}}\nquality: {{}}\n"
    )
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["chatreid", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_clean_recipe_filters_and_audits_with_exit_code_0(
    monkeypatch: pytest.MonkeyPatch, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "parse", config) == 0
    capsys.readouterr()
    assert run(monkeypatch, "filter", config, "--dry-run") == 0
    assert capsys.readouterr().out == "market1501: 0 of 16 training images go (0.00%)\n"
    assert run(monkeypatch, "audit", config) == 0
    assert capsys.readouterr().out == "16 training images against 8 query and gallery images: nothing leaks.\n"


def test_filter_takes_overrides_and_prints_json_alone(
    monkeypatch: pytest.MonkeyPatch, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "parse", config)
    capsys.readouterr()
    assert run(monkeypatch, "filter", config, "quality.min_width=1000", "--json") == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert source["dropped"] == {"min_width": 16}
    assert Path(source["sheet"]) == tmp_path / "manifests" / "market1501.quality.png"
    assert len(Path(source["drop_file"]).read_text().splitlines()) == 16


def test_audit_of_a_leaking_recipe_exits_with_3_and_writes_the_leaks(
    monkeypatch: pytest.MonkeyPatch, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = sorted((tmp_path / "world" / "query").iterdir())[0]
    planted = (
        tmp_path / "world" / "bounding_box_train" / query.name.replace(query.name[:4], "0001").replace("s1", "s9")
    )
    shutil.copy(query, planted)
    run(monkeypatch, "parse", config)
    capsys.readouterr()
    assert run(monkeypatch, "audit", config, "--json", "--write", str(tmp_path / "leaks.csv")) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["kinds"] == {"content": {"images": 1, "identities": 1}, "linked": {"images": 4, "identities": 1}}
    assert report["first"][0]["training_image"] == f"market1501/bounding_box_train/{planted.name}"
    assert report["first"][0]["tested_image"] == f"market1501/query/{query.name}"
    assert len((tmp_path / "leaks.csv").read_text().splitlines()) == 1 + 5
    assert run(monkeypatch, "audit", config) == 3
    assert f"market1501/bounding_box_train/{planted.name} = market1501/query/{query.name}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["filter", "audit"])
def test_missing_manifest_is_a_data_error(
    monkeypatch: pytest.MonkeyPatch, config: str, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(monkeypatch, command, config) == 3
    assert "chatreid parse CONFIG" in capsys.readouterr().err

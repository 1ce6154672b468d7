"""Tests of several evaluations in one run: their settings, what is missing, and the table at the end."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.__main__ import main
from chatreid_plugin.eval.batch import compare_evaluations, load_evaluations, run_evaluations
from chatreid_plugin.eval.distributed import Processes


@pytest.fixture
def configs(make_world: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Return two evaluations that differ in their benchmark, and one without its manifest."""
    manifest, files = make_world(), list[Path]()
    for name, benchmark, own in (
        ("one", "folder", manifest),
        ("two", "market1501", manifest),
        ("three", "folder", tmp_path / "absent.parquet"),
    ):
        content = {
            "data": {"benchmark": benchmark, "manifest": str(own)},
            "filter": {"source": "colour", "tau": -1},
            "scoring": {"backend": "random"},
            "output": {"output_dir": str(tmp_path / "results" / name)},
        }
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(content))
    return files


def test_several_end_in_one_table_and_page(
    configs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*map(str, configs[:2]), "filter.top_k=2"]) == 0
    output = capsys.readouterr()
    results = [json.loads((tmp_path / "results" / name / "results.json").read_text()) for name in ("one", "two")]
    assert [one["settings"]["filter"]["top_k"] for one in results] == [2, 2]
    for name, one in zip(("folder", "market1501"), results, strict=True):
        assert name in output.out and f"{100 * one['metrics']['mAP']:.1f} /" in output.out
    assert "Evaluation 2 of 2" in output.err
    assert (tmp_path / "results" / "comparison" / "comparison.html").is_file()


def test_json_of_several_is_a_list(configs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*map(str, configs[:2]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == [json.loads((tmp_path / "results" / name / "results.json").read_text()) for name in ("one", "two")]


def test_dry_run_of_several_describes_each(configs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*map(str, configs[:2]), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert output.count("pairs to score with backend random") == 2
    assert "results/one" in output and "results/two" in output


def test_missing_manifests_are_listed_before_anything_runs(configs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 3 evaluations lack.*--skip-missing:\n  .*three.yaml: .*absent.parquet"):
        load_evaluations(configs, [])
    with pytest.raises(DataError, match="1 of 1 evaluations lack"):
        load_evaluations(configs[2:], [], skip_missing=True)
    assert not (tmp_path / "results").exists()


def test_missing_manifests_are_skipped_if_asked_for(configs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = load_evaluations(configs, [], skip_missing=True)
    assert [one.output.output_dir.name for one in found] == ["one", "two"]
    assert "Skipped" in (said := capsys.readouterr().err) and "three.yaml" in said


def test_one_missing_split_counts_as_missing(configs: list[Path], tmp_path: Path) -> None:
    splits = [f"data.manifest={tmp_path}/s{{trial}}.parquet", "data.splits=[1,2]"]
    (tmp_path / "s1.parquet").touch()
    with pytest.raises(DataError, match=r"one.yaml: \S*s2.parquet\n"):
        load_evaluations(configs[:2], splits)


def test_two_evaluations_cannot_share_a_folder(configs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"one.yaml and .*two.yaml both write into .*shared"):
        load_evaluations(configs[:2], [f"output.output_dir={tmp_path / 'shared'}"])
    with pytest.raises(ConfigError, match="both write into"):
        load_evaluations([configs[0], configs[0]], [])
    found = load_evaluations(configs[:2], [f"output.output_dir={tmp_path}/mine/{{file}}"])
    assert [one.output.output_dir for one in found] == [tmp_path / "mine" / "one", tmp_path / "mine" / "two"]


def test_several_processes_share_each_evaluation(
    configs: list[Path], tmp_path: Path, run_together: Callable[..., list[Any]]
) -> None:
    alone = run_evaluations(load_evaluations(configs[:2], []), Processes())
    apart = load_evaluations(configs[:2], [f"output.output_dir={tmp_path}/apart/{{file}}"])
    found = run_together([partial(run_evaluations, apart)] * 2)
    for results in found:
        assert [one.ranking.mean_ap for one in results] == [one.ranking.mean_ap for one in alone]
    runs, page = compare_evaluations(apart)
    assert [run.folder.name for run in runs] == ["one", "two"] and page == tmp_path / "apart" / "comparison"

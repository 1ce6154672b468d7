"""Tests of chatreid_plugin.eval.comparison and its page: runs beside each other and beside the paper's rows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chatreid_plugin.cli import app
from chatreid_plugin.errors import DataError
from chatreid_plugin.eval.comparison import (
    build_radar,
    build_tables,
    find_disagreements,
    read_published,
    read_run,
)
from chatreid_plugin.eval.comparison_page import render_text, write_comparison
from chatreid_plugin.eval.pipeline import run_evaluation
from chatreid_plugin.eval_settings import EvalSettings


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]


@pytest.fixture
def runs(make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path) -> dict[str, Path]:
    """Return the folders of three evaluations: two of Market-1501 and one of a folder."""
    manifest = make_world()
    folders: dict[str, Path] = {}
    for name, changes in {
        "oracle": {"protocol": "market1501"},
        "random": {"protocol": "market1501", "backend": "random", "max_queries": 3},
        "mine": {"protocol": "folder"},
    }.items():
        folders[name] = tmp_path / "results" / name
        run_evaluation(make_settings(manifest, output_dir=folders[name], **changes))
    return folders


def test_measured_rows_stand_below_the_published_ones(runs: dict[str, Path]) -> None:
    tables = build_tables([read_run(folder) for folder in runs.values()])
    assert [table.title[:8] for table in tables] == ["Table 1.", "Table 4.", "Not in t"]
    first = tables[0]
    assert [row.published for row in first.rows] == [True] * 6 + [False] * 2
    assert {row.name: row.cells for row in first.rows}["ChatReID"] == ((96.4, 97.2), (87.5, 90.1), (91.3, 92.7))
    assert first.rows[-2].name == "oracle"
    assert first.rows[-2].cells == ((100.0, 100.0), (None, None), (None, None))
    assert tables[2].benchmarks == ("folder",)
    assert not any(row.published for row in tables[2].rows)


def test_second_run_of_a_benchmark_gets_a_row_of_its_own(runs: dict[str, Path]) -> None:
    twice = [read_run(runs["oracle"]), read_run(runs["oracle"])]
    (first, *_) = build_tables(twice)
    assert [row.name.startswith("oracle (") for row in first.rows[-2:]] == [True, True]
    assert len(build_radar(twice).rows) == len(build_radar(twice[:1]).rows)


def test_radar_has_ten_benchmarks_and_the_published_rows(runs: dict[str, Path]) -> None:
    radar = build_radar([read_run(runs["random"])])
    assert len(radar.benchmarks) == len(set(radar.benchmarks)) == 10
    assert [(row.name, row.published) for row in radar.rows] == [("ChatReID", True), ("IRM", True), ("random", False)]
    assert [cell[0] for cell in radar.rows[0].cells] == [96.4, 87.5, 91.3, 76.3, 75.6, 83.6, 95.8, 80.1, 70.5, 73.1]


def test_published_tables_are_whole() -> None:
    for table in read_published()["tables"]:
        for name, cells in table["rows"].items():
            assert len(cells) == len(table["benchmarks"]), (table["title"], name)
            assert all(cell is None or len(cell) == 2 for cell in cells)


def test_says_why_two_runs_cannot_be_compared(runs: dict[str, Path]) -> None:
    found = find_disagreements([read_run(folder) for folder in runs.values()])
    assert found == ["market1501: runs differ in queries: 3 | 4"]
    assert "Not comparable: market1501" in render_text([read_run(folder) for folder in runs.values()])


def test_writes_a_page_that_needs_nothing_else(runs: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "comparison"
    write_comparison(list(runs.values()), output)
    assert sorted(path.name for path in output.iterdir()) == [
        "cmc.png",
        "comparison.html",
        "comparison.json",
        "radar.png",
    ]
    page = (output / "comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert "ChatReID (published)" in page
    content = json.loads((output / "comparison.json").read_text())
    assert [run["benchmark"] for run in content["runs"]] == ["market1501", "market1501", "folder"]
    before = (output / "cmc.png").read_bytes()
    write_comparison(list(runs.values()), output)
    assert (output / "cmc.png").read_bytes() == before


def test_command_prints_json_alone_and_names_a_missing_run(runs: dict[str, Path], tmp_path: Path) -> None:
    names = [str(folder) for folder in runs.values()]
    done = CliRunner().invoke(app, ["report", *names, "--output", str(tmp_path / "page"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tables"][0]["rows"][-1]["name"] == "random"
    with pytest.raises(DataError, match=r"results\.json does not exist"):
        read_run(tmp_path)


def test_refuses_results_of_another_kind(runs: dict[str, Path]) -> None:
    path = runs["mine"] / "results.json"
    content = json.loads(path.read_text())
    del content["cmc_curve"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="lacks 'cmc_curve'"):
        read_run(runs["mine"])

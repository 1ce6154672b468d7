"""Tests of chatreid_plugin.eval.comparison and its page: runs beside each other and beside the paper's rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from chatreid_plugin.cli import app
from chatreid_plugin.errors import DataError
from chatreid_plugin.eval.comparison import (
    Run,
    build_radar,
    build_tables,
    find_differences,
    find_disagreements,
    find_runs,
    find_unlike_published,
    read_published,
    read_run,
    render_text,
    write_comparison,
)
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.shards import read_manifest
from tests.support import nest


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]
SIZE = "4 x 12 instead of 3,368 x 15,913"
SUBSET = f"random (market1501: single query, at most 3 queries, {SIZE})"


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
    assert first.rows[-2].name == f"oracle (market1501: single query, {SIZE})"
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
    assert [(row.name, row.published) for row in radar.rows] == [("ChatReID", True), ("IRM", True), (SUBSET, False)]
    assert [cell[0] for cell in radar.rows[0].cells] == [96.4, 87.5, 91.3, 76.3, 75.6, 83.6, 95.8, 80.1, 70.5, 73.1]


def make_run(folder: str, benchmark: str, scorer: str = "tiny", variant: str = "single query", **settings: Any) -> Run:
    """Return a run with these settings; the rest as in the files of eval/."""
    known = {"backend": "transformers", "mode": "pointwise", "fusion": "none", "fusion_weight": 0.5, "top_k": 100}
    known |= {"average_precision": "mean"}
    rest = dict.fromkeys(("max_queries", "setting", "shots"))
    protocol = {"unlike_published": settings.pop("unlike_published", ""), "variant": variant, "ignored": ""}
    protocol |= {"average_precision": settings.get("average_precision", "mean")}
    content = {
        "settings": nest(known | rest | {"protocol": benchmark, "restrict": False} | settings),
        "protocol": protocol | {"name": benchmark, "cmc": "standard", "ties": "expected", "queries": 3, "gallery": 9},
        "metrics": {"mAP": 0.5, "Rank-1": 0.25},
        "filter": {"source": settings.get("filter", "colour")},
        "cmc_curve": [0.25, 0.5],
        "warnings": [],
    }
    return Run(Path(folder), scorer, benchmark.partition("_")[0], content)


def list_measured(runs: list[Run]) -> dict[str, list[float | None]]:
    """Return the measured rows of table 4: name to mAP of Market-1501, LTCC and CUHK-PEDES."""
    (table,) = [table for table in build_tables(runs) if table.title.startswith("Table 4")]
    places = [table.benchmarks.index(name) for name in ("market1501", "ltcc", "cuhkpedes")]
    rows = [row for row in table.rows if not row.published]
    return {row.name: [row.cells[place][0] for place in places] for row in rows}


def test_a_row_never_mixes_modes() -> None:
    runs = [make_run("a", "market1501", mode="choice"), make_run("b", "ltcc")]
    assert list_measured(runs) == {
        "tiny (mode choice)": [50.0, None, None],
        "tiny (mode pointwise)": [None, 50.0, None],
    }
    assert [row.name for row in build_radar(runs).rows[2:]] == ["tiny (mode choice)", "tiny (mode pointwise)"]


def test_runs_that_differ_in_the_filter_alone_share_a_row_where_they_can() -> None:
    runs = [
        make_run("a", "market1501"),
        make_run("b", "market1501", filter="none"),
        make_run("c", "cuhkpedes", filter="none"),
    ]
    assert list_measured(runs[::2]) == {"tiny": [50.0, None, 50.0]}
    assert list_measured(runs) == {
        "tiny (filter colour, top 100)": [50.0, None, None],
        "tiny (filter none)": [50.0, None, 50.0],
    }


def test_rows_are_named_by_fusion_and_definition() -> None:
    runs = [
        make_run("a", "market1501"),
        make_run("b", "market1501", fusion="linear"),
        make_run("c", "market1501", average_precision="trapezoid"),
    ]
    assert list(list_measured(runs)) == [
        "tiny (fusion none)",
        "tiny (fusion linear 0.5)",
        "tiny (fusion none; market1501: single query, AP trapezoid)",
    ]


def test_same_runs_in_two_folders_are_named_by_folder() -> None:
    runs = [make_run("results/a", "market1501"), make_run("results/b", "market1501")]
    assert list(list_measured(runs)) == ["tiny (results/a)", "tiny (results/b)"]


def test_variants_that_differ_are_named_when_both_are_as_published() -> None:
    runs = [make_run("a", "ltcc", variant="one"), make_run("b", "ltcc", variant="two")]
    assert list(list_measured(runs)) == ["tiny (ltcc: one)", "tiny (ltcc: two)"]


def test_variants_other_than_the_published_ones_are_named_and_warned_of() -> None:
    runs = [
        make_run("a", "ltcc", variant="standard", setting="standard"),
        make_run("b", "sysumm01", variant="all-search, multi-shot", shots="multi"),
        make_run("c", "cuhk03_classic", variant="classic, split 1"),
        make_run("d", "market1501", max_queries=200),
        make_run("e", "regdb", setting="visible_to_infrared"),
        make_run("f", "prcc"),
        make_run("g", "msmt17", unlike_published="4 x 12 instead of 11,659 x 82,161"),
        make_run("h", "rstpreid", ignore_copies=True),
    ]
    assert find_unlike_published(runs) == [
        "ltcc in a: setting is standard, theirs cc",
        "sysumm01 in b: shots is multi, theirs single",
        "cuhk03 in c: benchmark is cuhk03_classic, theirs cuhk03",
        "market1501 in d: max_queries is 200, theirs not set",
        "msmt17 in g: queries x gallery images are 4 x 12 instead of 11,659 x 82,161",
        "rstpreid in h: ignore_copies is True, theirs not set",
    ]
    (table,) = [table for table in build_tables(runs) if table.title.startswith("Table 2")]
    assert table.rows[-1].name == "tiny (ltcc: standard)"
    text = render_text(runs)
    assert "Not comparable with the published rows: ltcc in a: setting is standard, theirs cc" in text
    assert "Not comparable:" not in text


def test_notes_runs_that_differ_in_mode_filter_or_fusion() -> None:
    runs = [make_run("a", "market1501", mode="turns"), make_run("b", "ltcc", filter="none")]
    assert find_differences(runs) == [
        "runs differ in mode: mode pointwise | mode turns",
        "runs differ in filter: filter colour, top 100 | filter none",
    ]
    assert "Note: runs differ in mode: mode pointwise | mode turns" in render_text(runs)
    assert find_disagreements(runs) == find_differences(runs[:1]) == []


def test_console_shows_whole_names() -> None:
    runs = [
        make_run(str(n), "market1501", scorer=f"saves/{n}/a_long_name_of_a_checkpoint_in_a_folder") for n in range(2)
    ]
    lines = render_text(runs).splitlines()
    assert all(any(line.startswith(f"{run.scorer} ") for line in lines) for run in runs)
    assert len({line.rindex("market1501") for line in lines if line.startswith("mAP / Rank-1")}) == 1


def test_files_of_other_models_have_rows_of_their_own(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = make_world()
    paths = [record.path for record in read_manifest(manifest)[0]]
    for name in ("one", "two"):
        np.savez(tmp_path / f"{name}.npz", paths=paths, features=np.eye(len(paths)))
        changes = {"backend": "features", "features": tmp_path / f"{name}.npz", "protocol": "market1501"}
        run_evaluation(make_settings(manifest, output_dir=tmp_path / "results" / name, **changes))
    found = [read_run(folder) for folder in find_runs([tmp_path / "results"])]
    names = [name.partition(" (")[0] for name in list_measured(found)]
    assert names == [f"features {tmp_path / 'one.npz'}", f"features {tmp_path / 'two.npz'}"]


def test_a_file_for_each_benchmark_is_one_row_of_one_name(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = make_world()
    paths = [record.path for record in read_manifest(manifest)[0]]
    for protocol in ("market1501", "msmt17"):
        file = tmp_path / f"{protocol}.npz"
        np.savez(file, paths=paths, features=np.eye(len(paths)))
        changes = {"backend": "features", "features": file, "protocol": protocol, "name": "OSNet"}
        run_evaluation(make_settings(manifest, output_dir=tmp_path / "results" / protocol, **changes))
    found = [read_run(folder) for folder in find_runs([tmp_path / "results"])]
    rows = build_tables(found)[0].rows
    assert [row.name.partition(" (")[0] for row in rows if not row.published] == ["OSNet"]
    assert [cell[0] is None for cell in rows[-1].cells] == [False, False, True]
    assert found[0].content["scores"]["source"] == f"features {tmp_path / 'market1501.npz'}"


def test_takes_all_runs_below_a_folder_and_each_once(runs: dict[str, Path], tmp_path: Path) -> None:
    nested = runs["mine"] / "split1"
    nested.mkdir()
    (nested / "results.json").write_text("{}")
    assert find_runs([tmp_path / "results", runs["oracle"]]) == sorted(runs.values())
    assert find_runs([nested]) == [nested]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no results.json, nor has any folder below it"):
        find_runs([runs["mine"], tmp_path / "empty"])


def test_published_tables_are_whole() -> None:
    for table in read_published()["tables"]:
        for name, cells in table["rows"].items():
            assert len(cells) == len(table["benchmarks"]), (table["title"], name)
            assert all(cell is None or len(cell) == 2 for cell in cells)
        for name, average in table.get("averages", {}).items():
            assert average == pytest.approx(np.mean([cell[0] for cell in table["rows"][name]]), abs=0.05)


def test_table_of_the_ablation_has_averages_of_whole_rows() -> None:
    benchmarks = build_radar([]).benchmarks
    runs = [make_run(name, name, scorer="whole") for name in benchmarks]
    runs[0].content["metrics"]["mAP"] = 0.75
    runs += [make_run(f"part/{name}", name, scorer="part") for name in benchmarks[1:]]
    tables = build_tables(runs)
    assert [table.title[:8] for table in tables if table.averaged] == ["Table 4."]
    (table,) = [table for table in tables if table.averaged]
    averages = {row.name.partition(" (")[0]: row.average for row in table.rows}
    assert averages == {"Stage 3": 41.0, "Stage 2 + Stage 3": 73.5, "ChatReID": 83.0, "whole": 52.5, "part": None}
    lines = [line.split() for line in render_text(runs).splitlines()]
    (place,) = [place for place, line in enumerate(lines) if "Avg." in line]
    assert [line[-1] for line in lines[place + 1 : place + 6]] == ["41.0", "73.5", "83.0", "52.5", "-"]


def test_says_why_two_runs_cannot_be_compared(runs: dict[str, Path]) -> None:
    found = find_disagreements([read_run(folder) for folder in runs.values()])
    assert found == ["market1501: runs differ in queries: 3 | 4"]
    assert "Not comparable: market1501" in render_text([read_run(folder) for folder in runs.values()])


@pytest.mark.parametrize("key", ["variant", "average_precision", "cmc", "ties", "queries", "gallery"])
def test_refuses_results_that_do_not_say_what_was_measured(runs: dict[str, Path], key: str) -> None:
    path = runs["mine"] / "results.json"
    content = json.loads(path.read_text())
    del content["protocol"][key]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"lacks '{key}'"):
        read_run(runs["mine"])


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
    assert page.count("<th>Avg.</th>") == 1
    assert [page.count(f"<td>{average}</td></tr>") for average in (41.0, 73.5, 83.0)] == [1, 1, 1]
    content = json.loads((output / "comparison.json").read_text())
    assert [run["benchmark"] for run in content["runs"]] == ["market1501", "market1501", "folder"]
    before = (output / "cmc.png").read_bytes()
    write_comparison(list(runs.values()), output)
    assert (output / "cmc.png").read_bytes() == before


def test_command_prints_json_alone_and_names_a_missing_run(runs: dict[str, Path], tmp_path: Path) -> None:
    names = [str(folder) for folder in runs.values()]
    done = CliRunner().invoke(app, ["report", *names, "--output", str(tmp_path / "page"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tables"][0]["rows"][-1]["name"] == SUBSET
    with pytest.raises(DataError, match=r"results\.json does not exist"):
        read_run(tmp_path)


def test_refuses_results_of_another_kind(runs: dict[str, Path]) -> None:
    path = runs["mine"] / "results.json"
    content = json.loads(path.read_text())
    del content["cmc_curve"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="lacks 'cmc_curve'"):
        read_run(runs["mine"])

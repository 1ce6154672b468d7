"""Finished evaluations side by side, and beside the rows that the paper prints: behind ``chatreid report``.

Runs are read back from their folders, put into the paper's tables, and shown as text, JSON, an HTML page, CMC curves
and the radar of the paper's figure 1. matplotlib's objects draw, not pyplot: no figure stays open behind the caller's
back, no screen is needed.
"""

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from matplotlib.figure import Figure

from ..datasets.registry import list_benchmarks
from ..errors import DataError
from ..html import embed_png, encode_png, render_template
from ..printing import render_table
from ..shards import open_atomically, read_json, write_json, write_text


PUBLISHED = Path(__file__).with_name("published.yaml")
TEMPLATE = Path(__file__).with_name("comparison.html.j2")

# What runs of one benchmark have to agree in, as in the protocol of results.json.
DEFINING = ("variant", "average_precision", "cmc", "ties", "queries", "gallery")

# mAP and Rank-1 in percent; None where nobody measured it.
Cell = tuple[float | None, float | None]
NO_CELL: Cell = (None, None)
PALETTE = ("#2f5bd7", "#c2362f", "#12804a", "#b7791f", "#805ad5", "#0f8a9d", "#8d5524", "#5a6472")
PUBLISHED_COLOURS = ("#9aa3b2", "#c9ced8")
PANELS_IN_ROW = 3
LABEL_WIDTH = 44  # characters a line of a legend


@dataclass(frozen=True, slots=True)
class Run:
    """One finished evaluation, read from its ``results.json``.

    Attributes:
        folder: where it lies.
        scorer: the checkpoint, server's model, file or backend that scored.
        benchmark: data set, as ``published.yaml`` names it.
        content: the whole of ``results.json``; metrics are fractions.
    """

    folder: Path
    scorer: str
    benchmark: str
    content: Mapping[str, Any]

    @property
    def cell(self) -> Cell:
        """MAP and Rank-1 in percent."""
        metrics = self.content["metrics"]
        return 100.0 * metrics["mAP"], 100.0 * metrics["Rank-1"]

    @property
    def protocol(self) -> Mapping[str, Any]:
        """Name, variant and definitions of what was measured."""
        return self.content["protocol"]

    @property
    def variant(self) -> str:
        """The protocol's variant without its rule, which follows from it, and what else makes other numbers."""
        most, definition = self.content["settings"]["data"]["max_queries"], self.protocol["average_precision"]
        parts = [str(self.protocol["variant"]).replace(f", {self.protocol['ignored']}", "")]
        parts += [f"at most {most} queries"] if most is not None else []
        parts += [self.protocol["unlike_published"]] if self.protocol["unlike_published"] else []
        return ", ".join([*parts, f"AP {definition}"] if definition != "mean" else parts)

    @property
    def traits(self) -> dict[str, str]:
        """How it was asked and measured, in words: what runs of one scorer may differ in besides the benchmark."""
        scoring = self.content["settings"]["scoring"]
        fusion = scoring["fusion"]
        asked = scoring["backend"] in ("transformers", "http", "random", "oracle")
        weight = f" {scoring['fusion_weight']}" if fusion in ("linear", "k_reciprocal") else ""
        return {
            "mode": f"mode {scoring['mode']}" if asked else "",
            "fusion": f"fusion {fusion}{weight}",
            "filter": self.filter,
        }

    @property
    def filter(self) -> str:
        """Source and cap of its filter."""
        source, most = self.content["filter"]["source"], self.content["settings"]["filter"]["top_k"]
        return f"filter {source}" if source == "none" or most is None else f"filter {source}, top {most}"

    @property
    def key(self) -> tuple[str, ...]:
        """What the runs of one row of a table share; a filter may differ, as words cannot be filtered by images."""
        return self.scorer, self.traits["mode"], self.traits["fusion"], self.protocol["average_precision"]


def write_comparison(folders: Sequence[Path], output: Path) -> list[Run]:
    """Compare the evaluations in or below some folders.

    Writes ``comparison.html``, ``comparison.json`` and two pictures into ``output``.

    Raises:
        DataError: a folder holds no finished evaluation.
    """
    runs = [read_run(folder) for folder in find_runs(folders)]
    pictures = {"cmc.png": draw_curves(runs), "radar.png": encode_png(draw_radar(build_radar(runs)))}
    for name, content in pictures.items():
        with open_atomically(output / name) as temporary:
            temporary.write_bytes(content)
    write_json(output / "comparison.json", describe_comparison(runs))
    write_text(output / "comparison.html", render_page(runs, pictures["cmc.png"], pictures["radar.png"]))
    return runs


def read_run(folder: Path) -> Run:
    """Return the evaluation of a folder.

    Raises:
        DataError: there is no finished evaluation, or its ``results.json`` is of another kind or version.
    """
    path = folder / "results.json"
    if not path.is_file():
        advice = "An evaluation writes it when it is finished: python -m chatreid_plugin.eval CONFIG.yaml"
        raise DataError(f"{path} does not exist. {advice}")
    content = read_json(path)
    try:
        protocol = content["protocol"]
        run = Run(folder, content["scores"]["scorer"], str(protocol["name"]).partition("_")[0], content)
        _ = run.cell, run.variant, run.key, content["filter"]["recall_at"], content["cmc_curve"], content["warnings"]
        _ = [protocol[key] for key in DEFINING]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no results.json of this version (it lacks {error}). Evaluate again; saved scores are used."
        ) from None
    return run


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the folders of finished evaluations, each once: those given, and all below a folder that is none itself.

    The splits of an evaluation lie below it and are no evaluations of their own here.

    Raises:
        DataError: a folder has no finished evaluation, nor has any below it.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        below = [folder] if (folder / "results.json").is_file() else _list_below(folder)
        if not below:
            raise DataError(
                f"{folder} has no results.json, nor has any folder below it. An evaluation writes it into its "
                "output_dir when it is finished: python -m chatreid_plugin.eval CONFIG.yaml"
            )
        for path in below:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _list_below(folder: Path) -> list[Path]:
    every = {path.parent for path in folder.rglob("results.json")}
    return sorted(path for path in every if every.isdisjoint(path.parents))


@cache
def read_published() -> Mapping[str, Any]:
    """Return what the paper prints (``published.yaml``)."""
    return yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))


def list_unlike_published(run: Run) -> list[str]:
    """Return, in words, how a run was measured otherwise than the published rows of its benchmark."""
    published = read_published()["measured_as"]
    data: Mapping[str, Any] = run.content["settings"]["data"]
    rules = list_benchmarks().get(run.benchmark)
    choices = rules.choices if rules else {}
    found: list[str] = []
    for key, wanted in {**published["all"], **published.get(run.benchmark, {})}.items():
        value = choices.get(key, (None,))[0] if data.get(key) is None else data[key]
        if value != wanted and (value or wanted):
            found.append(f"{key} is {value}, theirs {wanted or 'not set'}")
    if run.protocol["unlike_published"]:
        found.append(f"queries x gallery images are {run.protocol['unlike_published']}")
    return found


def find_unlike_published(runs: Sequence[Run]) -> list[str]:
    """Return, in words, which runs cannot be compared with the published rows beside them, and why."""
    known = {benchmark for table in read_published()["tables"] for benchmark in table["benchmarks"]}
    reasons = [(run, list_unlike_published(run)) for run in runs if run.benchmark in known]
    return [f"{run.benchmark} in {run.folder}: {'; '.join(found)}" for run, found in reasons if found]


def find_disagreements(runs: Sequence[Run]) -> list[str]:
    """Return, in words, why runs of one benchmark cannot be compared: other definitions, other queries, other ties."""
    found: list[str] = []
    for benchmark in dict.fromkeys(run.benchmark for run in runs):
        same = [run for run in runs if run.benchmark == benchmark]
        for key in DEFINING:
            values = sorted({str(run.protocol[key]) for run in same})
            if len(values) > 1:
                found.append(f"{benchmark}: runs differ in {key}: {' | '.join(values)}")
    return found


def find_differences(runs: Sequence[Run]) -> list[str]:
    """Return, in words, in what runs beside each other differ without being wrong: mode, filter, fusion."""
    found: list[str] = []
    for key in ("mode", "filter", "fusion"):
        values = sorted({run.traits[key] for run in runs} - {""})
        if len(values) > 1:
            found.append(f"runs differ in {key}: {' | '.join(values)}")
    return found


def list_remarks(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return, in words, what has to be known before runs are compared or their figures quoted."""
    return {
        "disagreements": find_disagreements(runs),
        "unlike_published": find_unlike_published(runs),
        "differences": find_differences(runs),
        "warnings": [f"{run.benchmark} in {run.folder}: {text}" for run in runs for text in run.content["warnings"]],
    }


@dataclass(frozen=True, slots=True)
class Row:
    """One method in a table; ``published`` rows are quoted from the paper, the others are measured.

    ``average`` is that of the mAP of all benchmarks, where the paper's table has such a column and none is missing.
    """

    name: str
    published: bool
    cells: tuple[Cell, ...]
    average: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the paper with the measured rows below: ``rows[i].cells[j]`` belongs to ``benchmarks[j]``.

    ``averaged`` says whether the rows' averages are a column of it.
    """

    title: str
    benchmarks: tuple[str, ...]
    rows: tuple[Row, ...]
    averaged: bool = False


def _list_published_rows(table: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    averages = table.get("averages", {})
    for name, cells in table["rows"].items():
        known = tuple(NO_CELL if cell is None else (cell[0], cell[1]) for cell in cells)
        rows.append(Row(name, True, known, averages.get(name)))
    return rows


def _share_out(runs: Sequence[Run], benchmarks: Sequence[str]) -> list[dict[str, Run]]:
    """Return rows of runs, by benchmark: of one scorer, asked and measured in one way.

    A second run of the same benchmark (another setting or filter) gets a row of its own; runs with the same filter
    come together where they can.
    """
    rows: list[dict[str, Run]] = []
    for run in runs:
        if run.benchmark not in benchmarks:
            continue
        fitting = [row for row in rows if next(iter(row.values())).key == run.key and run.benchmark not in row]
        alike = [row for row in fitting if run.filter in {other.filter for other in row.values()}]
        place = next(iter(alike or fitting), None)
        if place is None:
            rows.append(place := {})
        place[run.benchmark] = run
    return rows


def _list_traits(row: Mapping[str, Run], runs: Sequence[Run]) -> dict[str, str]:
    """Return what a row may be told from another by; variants only where they are not what all others have."""
    traits = {
        key: ", ".join(sorted({run.traits[key] for run in row.values()})) for key in next(iter(row.values())).traits
    }
    unusual: list[str] = []
    for benchmark, run in row.items():
        usual = [other for other in runs if other.benchmark == benchmark and not list_unlike_published(other)]
        if list_unlike_published(run) or len({other.variant for other in usual}) > 1:
            unusual.append(f"{benchmark}: {run.variant}")
    return traits | {"variant": "; ".join(unusual)}


def name_rows(rows: Sequence[Mapping[str, Run]]) -> list[str]:
    """Return a name for each row of runs: its scorer, and what tells it from that scorer's other rows.

    A variant other than that of the published rows is always named.
    """
    runs = [run for row in rows for run in row.values()]
    scorers = [next(iter(row.values())).scorer for row in rows]
    traits = [_list_traits(row, runs) for row in rows]
    names: list[str] = []
    for scorer, own in zip(scorers, traits, strict=True):
        same = [other for other, known in zip(traits, scorers, strict=True) if known == scorer]
        words = [
            value for key, value in own.items() if value and (key == "variant" or len({o[key] for o in same}) > 1)
        ]
        names.append(f"{scorer} ({'; '.join(words)})" if words else scorer)
    doubled = {name for name in names if names.count(name) > 1}
    folders = ["; ".join(str(run.folder) for run in row.values()) for row in rows]
    return [f"{name} ({where})" if name in doubled else name for name, where in zip(names, folders, strict=True)]


def _list_measured_rows(runs: Sequence[Run], benchmarks: Sequence[str], *, averaged: bool = False) -> list[Row]:
    """Return the runs' rows; ``averaged``: each with the average of its mAP, if it has all of them."""
    rows: list[Row] = []
    shared = _share_out(runs, benchmarks)
    for name, row in zip(name_rows(shared), shared, strict=True):
        cells = tuple(row[benchmark].cell if benchmark in row else NO_CELL for benchmark in benchmarks)
        values = [mean_ap for mean_ap, _ in cells if mean_ap is not None]
        rows.append(Row(name, False, cells, fmean(values) if averaged and len(values) == len(cells) else None))
    return rows


def build_tables(runs: Sequence[Run]) -> list[Table]:
    """Return the paper's tables that hold a benchmark of the runs, their measured rows last, then one for the rest."""
    tables: list[Table] = []
    named: set[str] = set()
    for table in read_published()["tables"]:
        benchmarks = tuple(table["benchmarks"])
        named |= set(benchmarks)
        averaged = "averages" in table
        measured = _list_measured_rows(runs, benchmarks, averaged=averaged)
        if measured:
            tables.append(Table(table["title"], benchmarks, (*_list_published_rows(table), *measured), averaged))
    others = tuple(dict.fromkeys(run.benchmark for run in runs if run.benchmark not in named))
    if others:
        tables.append(Table("Not in the paper", others, tuple(_list_measured_rows(runs, others))))
    return tables


def build_radar(runs: Sequence[Run]) -> Table:
    """Return the rows of the paper's figure 1: mAP on its ten benchmarks, the first run of each last."""
    published = read_published()
    tables = [table for table in published["tables"] if not table["title"].startswith(("Table 4", "Table 6"))]
    cells: dict[str, dict[str, Cell]] = {name: {} for name in published["radar"]}
    for table in tables:
        for row in _list_published_rows(table):
            if row.name in cells:
                cells[row.name] |= dict(zip(table["benchmarks"], row.cells, strict=True))
    benchmarks = tuple(benchmark for table in tables for benchmark in table["benchmarks"])
    rows = [Row(name, True, tuple(row.get(b, NO_CELL) for b in benchmarks)) for name, row in cells.items()]
    first = {(run.key, run.benchmark): run for run in reversed(runs)}
    chosen = [run for run in runs if first[run.key, run.benchmark] is run]
    return Table("Figure 1. mAP", benchmarks, (*rows, *_list_measured_rows(chosen, benchmarks)))


def describe_comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """Return everything the page shows as JSON values; cells are [mAP, Rank-1] in percent, published rows marked.

    Averages are of mAP.
    """
    return {
        "source_of_published_rows": read_published()["source"],
        "tables": [asdict(table) for table in build_tables(runs)],
        "radar": asdict(build_radar(runs)),
        **list_remarks(runs),
        "runs": [
            {"folder": str(run.folder), "scorer": run.scorer, "benchmark": run.benchmark}
            | {key: run.content[key] for key in ("protocol", "metrics", "strict", "filter")}
            for run in runs
        ],
    }


def draw_curves(runs: Sequence[Run]) -> bytes:
    """Return the runs' CMC curves as a PNG file, a panel for each benchmark."""
    panels: dict[str, dict[str, Sequence[float]]] = {}
    for benchmark in dict.fromkeys(run.benchmark for run in runs):
        same = [run for run in runs if run.benchmark == benchmark]
        names = name_rows([{benchmark: run} for run in same])
        panels[benchmark] = {name: run.content["cmc_curve"] for name, run in zip(names, same, strict=True)}
    return encode_png(draw_cmc_curves(panels))


def _show_percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def render_text(runs: Sequence[Run]) -> str:
    """Return the tables in words, percent; published rows carry an asterisk."""
    lines: list[str] = []
    for table in build_tables(runs):
        columns = ["mAP / Rank-1", *table.benchmarks, *(["Avg. mAP"] if table.averaged else [])]
        rows: list[list[str]] = []
        for row in table.rows:
            cells = [" / ".join(map(_show_percent, cell)) for cell in row.cells]
            cells += [_show_percent(row.average)] if table.averaged else []
            rows.append([f"{row.name}{'*' if row.published else ''}", *cells])
        lines += [table.title, render_table(columns, rows), ""]
    lines.append(f"* published: {read_published()['source']}")
    titles = ("Not comparable", "Not comparable with the published rows", "Note", "Warning")
    for title, remarks in zip(titles, list_remarks(runs).values(), strict=True):
        lines += [f"{title}: {remark}" for remark in remarks]
    return "\n".join(lines)


def render_page(runs: Sequence[Run], curves: bytes, radar: bytes) -> str:
    """Return the HTML of the page."""
    return render_template(
        TEMPLATE,
        tables=build_tables(runs),
        runs=runs,
        source=read_published()["source"],
        **list_remarks(runs),
        curves=embed_png(curves),
        radar=embed_png(radar),
    )


def dump_comparison(runs: Sequence[Run]) -> str:
    """Return the JSON of the comparison as text."""
    return json.dumps(describe_comparison(runs), indent=2, ensure_ascii=False)


def draw_cmc_curves(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Return a panel for each benchmark with a curve for each run.

    Args:
        panels: benchmark to (label to matching rates at ranks 1, 2, ..., as fractions).
    """
    columns = min(len(panels), PANELS_IN_ROW)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    for place, (benchmark, curves) in enumerate(panels.items()):
        axes: Any = figure.add_subplot(rows, columns, place + 1)
        for number, curve in enumerate(curves.values()):
            ranks = range(1, len(curve) + 1)
            colour = PALETTE[number % len(PALETTE)]
            axes.plot(ranks, [100 * rate for rate in curve], color=colour, lw=1.8, label=str(number))
        axes.set_title(benchmark, fontsize=10)
        axes.set_xlabel("rank", fontsize=9)
        axes.set_ylabel("matching rate, %", fontsize=9)
        axes.set_ylim(top=101)
        axes.grid(color="#e3e7ee", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        _name_curves(axes.legend(fontsize=7, frameon=False, loc="lower right"), curves)
    return figure


def draw_radar(table: Table) -> Figure:
    """Return mAP on a spoke for each benchmark; published rows are dashed, what nobody measured is a gap."""
    figure = Figure(figsize=(7.0, 5.6), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * place / len(table.benchmarks) for place in range(len(table.benchmarks))]
    colours = {True: iter(PUBLISHED_COLOURS * len(table.rows)), False: iter(PALETTE * len(table.rows))}
    for row in table.rows:
        values = [math.nan if cell[0] is None else cell[0] for cell in row.cells]
        style = "--" if row.published else "-"
        closed = [*angles, angles[0]], [*values, values[0]]
        axes.plot(
            *closed,
            style,
            marker="o",
            ms=3,
            lw=1.6,
            color=next(colours[row.published]),
            label="curve",  # renamed below
        )
    axes.set_xticks(angles, table.benchmarks, fontsize=8)
    axes.set_ylim(0, 100)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.tick_params(axis="y", labelsize=7, colors="#667085")
    axes.grid(color="#d7dce5", lw=0.6)
    named = figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    _name_curves(named, [f"{row.name} (published)" if row.published else row.name for row in table.rows])
    return figure


def _name_curves(legend: Any, names: Iterable[str]) -> None:
    """Write the names of the curves, which come from users, as they are: a pair of $ is no formula."""
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(textwrap.fill(name, LABEL_WIDTH))

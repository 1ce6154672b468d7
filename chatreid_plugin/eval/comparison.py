"""Several finished evaluations side by side, and beside the rows that the paper prints: behind ``chatreid report``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError
from ..shards import read_json


PUBLISHED = Path(__file__).with_name("published.yaml")

# mAP and Rank-1 in percent; None where nobody measured it.
Cell = tuple[float | None, float | None]
NO_CELL: Cell = (None, None)


@dataclass(frozen=True, slots=True)
class Run:
    """One finished evaluation, read from its ``results.json``.

    Attributes:
        folder: where it lies.
        scorer: the checkpoint or backend that scored.
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


@dataclass(frozen=True, slots=True)
class Row:
    """One method in a table; ``published`` rows are quoted from the paper, the others are measured."""

    name: str
    published: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the paper with the measured rows below: ``rows[i].cells[j]`` belongs to ``benchmarks[j]``."""

    title: str
    benchmarks: tuple[str, ...]
    rows: tuple[Row, ...]


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
        settings, protocol = content["settings"], content["protocol"]
        model = settings["backend"] in ("transformers", "http")
        scorer = str(settings.get("model_name_or_path") or settings.get("model")) if model else settings["backend"]
        run = Run(folder, scorer, str(protocol["name"]).partition("_")[0], content)
        _ = run.cell, protocol["variant"], content["filter"]["recall"], content["cmc_curve"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no results.json of this version (it lacks {error}). Evaluate again.") from None
    return run


@cache
def read_published() -> Mapping[str, Any]:
    """Return what the paper prints (``published.yaml``)."""
    return yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))


def _list_published_rows(table: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for name, cells in table["rows"].items():
        rows.append(Row(name, True, tuple(NO_CELL if cell is None else (cell[0], cell[1]) for cell in cells)))
    return rows


def _list_measured_rows(runs: Sequence[Run], benchmarks: Sequence[str]) -> list[Row]:
    """Return a row for each scorer; a second run of the same benchmark (another setting) gets a row of its own."""
    rows: list[tuple[str, dict[str, Run]]] = []
    for run in runs:
        if run.benchmark not in benchmarks:
            continue
        place = next((row for name, row in rows if name == run.scorer and run.benchmark not in row), None)
        if place is None:
            rows.append((run.scorer, place := {}))
        place[run.benchmark] = run
    measured: list[Row] = []
    for scorer, row in rows:
        variants = sorted({run.protocol["variant"] for run in row.values()})
        name = scorer if len(rows) == len({name for name, _ in rows}) else f"{scorer} ({'; '.join(variants)})"
        measured.append(Row(name, False, tuple(row[b].cell if b in row else NO_CELL for b in benchmarks)))
    return measured


def build_tables(runs: Sequence[Run]) -> list[Table]:
    """Return the paper's tables that hold a benchmark of the runs, their measured rows last, then one for the rest."""
    tables: list[Table] = []
    named: set[str] = set()
    for table in read_published()["tables"]:
        benchmarks = tuple(table["benchmarks"])
        named |= set(benchmarks)
        measured = _list_measured_rows(runs, benchmarks)
        if measured:
            tables.append(Table(table["title"], benchmarks, (*_list_published_rows(table), *measured)))
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
    first = {(run.scorer, run.benchmark): run for run in reversed(runs)}
    chosen = [run for run in runs if first[run.scorer, run.benchmark] is run]
    return Table("Figure 1. mAP", benchmarks, (*rows, *_list_measured_rows(chosen, benchmarks)))


def find_disagreements(runs: Sequence[Run]) -> list[str]:
    """Return, in words, why runs of one benchmark cannot be compared: other definitions, other queries, other ties."""
    found: list[str] = []
    for benchmark in dict.fromkeys(run.benchmark for run in runs):
        same = [run for run in runs if run.benchmark == benchmark]
        for key in ("variant", "average_precision", "cmc", "ties", "queries", "gallery"):
            values = sorted({str(run.protocol.get(key)) for run in same})
            if len(values) > 1:
                found.append(f"{benchmark}: runs differ in {key}: {' | '.join(values)}")
    return found

"""Several finished evaluations side by side, and beside the rows that the paper prints: behind ``chatreid report``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from .finished import Cell, Run, list_unlike_published, read_published


NO_CELL: Cell = (None, None)


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


def _average(row: Row) -> Row:
    """Return a measured row with the average of its mAP, if it has all of them."""
    values = [mean_ap for mean_ap, _ in row.cells if mean_ap is not None]
    return replace(row, average=fmean(values)) if len(values) == len(row.cells) else row


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


def _list_measured_rows(runs: Sequence[Run], benchmarks: Sequence[str]) -> list[Row]:
    rows = _share_out(runs, benchmarks)
    return [
        Row(name, False, tuple(row[b].cell if b in row else NO_CELL for b in benchmarks))
        for name, row in zip(name_rows(rows), rows, strict=True)
    ]


def build_tables(runs: Sequence[Run]) -> list[Table]:
    """Return the paper's tables that hold a benchmark of the runs, their measured rows last, then one for the rest."""
    tables: list[Table] = []
    named: set[str] = set()
    for table in read_published()["tables"]:
        benchmarks = tuple(table["benchmarks"])
        named |= set(benchmarks)
        measured = _list_measured_rows(runs, benchmarks)
        averaged = "averages" in table
        if averaged:
            measured = [_average(row) for row in measured]
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

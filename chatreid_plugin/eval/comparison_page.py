"""The page that compares runs: tables, curves and the radar, in one HTML file that needs no network."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..pages import embed_png, encode_png, render_template
from ..shards import open_atomically, write_json, write_text
from .comparison import build_radar, build_tables, name_rows
from .figures import draw_cmc_curves, draw_radar
from .finished import (
    Run,
    find_differences,
    find_disagreements,
    find_runs,
    find_unlike_published,
    find_warnings,
    read_published,
    read_run,
)


TEMPLATE = Path(__file__).with_name("comparison.html.j2")


def describe_comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """Return everything the page shows as JSON values; cells are [mAP, Rank-1] in percent, published rows marked.

    Averages are of mAP.
    """
    return {
        "source_of_published_rows": read_published()["source"],
        "tables": [asdict(table) for table in build_tables(runs)],
        "radar": asdict(build_radar(runs)),
        "disagreements": find_disagreements(runs),
        "unlike_published": find_unlike_published(runs),
        "differences": find_differences(runs),
        "warnings": find_warnings(runs),
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
    tables = build_tables(runs)
    width = 2 + max(len("mAP / Rank-1"), *(len(row.name) + row.published for table in tables for row in table.rows))
    for table in tables:
        columns = [*table.benchmarks, *(["Avg. mAP"] if table.averaged else [])]
        lines += [table.title, f"{'mAP / Rank-1':<{width}}" + "".join(f"{name:>15}" for name in columns)]
        for row in table.rows:
            cells = [" / ".join(map(_show_percent, cell)) for cell in row.cells]
            cells += [_show_percent(row.average)] if table.averaged else []
            lines.append(f"{row.name + ('*' if row.published else ''):<{width}}" + "".join(f"{c:>15}" for c in cells))
        lines.append("")
    lines.append(f"* published: {read_published()['source']}")
    lines += [f"Not comparable: {reason}" for reason in find_disagreements(runs)]
    lines += [f"Not comparable with the published rows: {reason}" for reason in find_unlike_published(runs)]
    lines += [f"Note: {reason}" for reason in find_differences(runs)]
    lines += [f"Warning: {warning}" for warning in find_warnings(runs)]
    return "\n".join(lines)


def render_page(runs: Sequence[Run], curves: bytes, radar: bytes) -> str:
    """Return the HTML of the page."""
    return render_template(
        TEMPLATE,
        tables=build_tables(runs),
        runs=runs,
        source=read_published()["source"],
        disagreements=find_disagreements(runs),
        unlike_published=find_unlike_published(runs),
        differences=find_differences(runs),
        warnings=find_warnings(runs),
        curves=embed_png(curves),
        radar=embed_png(radar),
    )


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


def dump_comparison(runs: Sequence[Run]) -> str:
    """Return the JSON of the comparison as text."""
    return json.dumps(describe_comparison(runs), indent=2, ensure_ascii=False)

"""The page that compares runs: tables, curves and the radar, in one HTML file that needs no network."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..pages import embed_png, encode_png, render_template
from ..shards import open_atomically, write_json, write_text
from .comparison import Run, build_radar, build_tables, find_disagreements, read_published, read_run
from .figures import draw_cmc_curves, draw_radar


TEMPLATE = Path(__file__).with_name("comparison.html.j2")


def describe_comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """Return everything the page shows as JSON values; cells are [mAP, Rank-1] in percent, published rows marked."""
    return {
        "source_of_published_rows": read_published()["source"],
        "tables": [asdict(table) for table in build_tables(runs)],
        "radar": asdict(build_radar(runs)),
        "disagreements": find_disagreements(runs),
        "runs": [
            {"folder": str(run.folder), "scorer": run.scorer, "benchmark": run.benchmark}
            | {key: run.content[key] for key in ("protocol", "metrics", "strict", "filter")}
            for run in runs
        ],
    }


def draw_curves(runs: Sequence[Run]) -> bytes:
    """Return the runs' CMC curves as a PNG file, a panel for each benchmark."""
    panels: dict[str, dict[str, Sequence[float]]] = {}
    for run in runs:
        curves = panels.setdefault(run.benchmark, {})
        label = run.scorer if run.scorer not in curves else f"{run.scorer} ({run.folder})"
        curves[label] = run.content["cmc_curve"]
    return encode_png(draw_cmc_curves(panels))


def render_text(runs: Sequence[Run]) -> str:
    """Return the tables in words, percent; published rows carry an asterisk."""
    lines: list[str] = []
    for table in build_tables(runs):
        lines += [table.title, f"{'mAP / Rank-1':<40}" + "".join(f"{name:>15}" for name in table.benchmarks)]
        for row in table.rows:
            cells = [" / ".join("-" if value is None else f"{value:.1f}" for value in cell) for cell in row.cells]
            lines.append(f"{row.name[-38:] + ('*' if row.published else ''):<40}" + "".join(f"{c:>15}" for c in cells))
        lines.append("")
    lines.append(f"* published: {read_published()['source']}")
    lines += [f"Not comparable: {reason}" for reason in find_disagreements(runs)]
    return "\n".join(lines)


def render_page(runs: Sequence[Run], curves: bytes, radar: bytes) -> str:
    """Return the HTML of the page."""
    return render_template(
        TEMPLATE,
        tables=build_tables(runs),
        runs=runs,
        source=read_published()["source"],
        disagreements=find_disagreements(runs),
        curves=embed_png(curves),
        radar=embed_png(radar),
    )


def write_comparison(folders: Sequence[Path], output: Path) -> list[Run]:
    """Compare the evaluations of some folders; write ``comparison.html``, ``.json`` and two pictures into ``output``.

    Raises:
        DataError: a folder holds no finished evaluation.
    """
    runs = [read_run(folder) for folder in folders]
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

"""CMC curves and the radar of the paper's figure 1.

Drawn with matplotlib's objects, not with pyplot: no figure stays open behind the caller's back, no screen is needed.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from .comparison import Table


PALETTE = ("#2f5bd7", "#c2362f", "#12804a", "#b7791f", "#805ad5", "#0f8a9d", "#8d5524", "#5a6472")
PUBLISHED_COLOURS = ("#9aa3b2", "#c9ced8")
PANELS_IN_ROW = 3
LABEL_WIDTH = 44  # characters a line of a legend


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

"""The figures of ``chatreid stats``: one for each topic, several panels where data sets or sources stand side by side.

Drawn with matplotlib's objects, not with pyplot: no figure stays open behind the caller's back, no screen is needed.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .expectations import Comparison
from .identities import IdentityStatistics
from .report import TOKEN_BIN, DatasetStatistics, Statistics


COUNTED, INTENDED, LIMIT = "#5b8def", "#1c2330", "#c2362f"
PALETTE = ("#5b8def", "#f0a35e", "#56b08a", "#c98bd6", "#d9705f", "#8d99ae", "#c7b446", "#4fb3c4")
PANELS_IN_ROW = 3
HISTOGRAM_BINS = 40
LEGEND_COLUMNS = 6


def shorten_name(name: str) -> str:
    """Return a data set's name without the prefix that all built ones share."""
    return name.removeprefix("chatreid_")


def _clean_axes(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_axisbelow(True)


def _make_panels(count: int, width: float = 4.0, height: float = 2.5) -> tuple[Figure, list[Any]]:
    columns = min(count, PANELS_IN_ROW)
    rows = math.ceil(count / columns)
    # A lone panel is as wide as two, or its title does not fit.
    figure = Figure(figsize=(width * max(columns, 2), height * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[:count]:
        _clean_axes(axes)
        axes.grid(axis="y", color="#e3e7ee")
    return figure, grid[:count]


def _make_bars(count: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9.5, 1.3 + 0.34 * count), layout="constrained")
    axes = figure.subplots()
    _clean_axes(axes)
    axes.grid(axis="x", color="#e3e7ee")
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:.0%}")
    return figure, axes


def _add_legend(figure: Figure, axes: Any) -> None:
    """Put the legend of one panel above all of them, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=LEGEND_COLUMNS, loc="outside upper center", frameon=False)


def draw_records(statistics: Statistics) -> Figure:
    """Return bars of each task's share in its stage, the intended share marked."""
    figure, axes = _make_bars(len(statistics.datasets))
    places = np.arange(len(statistics.datasets))
    datasets = list(statistics.datasets.values())
    axes.barh(places, [one.share for one in datasets], color=COUNTED, label="built")
    axes.plot([one.intended_share for one in datasets], places, "|", color=INTENDED, ms=16, mew=2, label="intended")
    axes.set_yticks(places, [shorten_name(name) for name in statistics.datasets])
    for place, one in zip(places, datasets, strict=True):
        axes.annotate(
            f" {one.records:,}", (one.share, place), va="center", fontsize=8, xytext=(4, 0), textcoords="offset points"
        )
    axes.set_xlabel("share of the stage's records (number of records beside the bar)", fontsize=9)
    axes.set_xlim(0, 1.15)
    _add_legend(figure, axes)
    return figure


def draw_comparisons(found: Mapping[str, Comparison], label: str) -> Figure:
    """Return a panel for each data set: bars of what was counted, dots where the recipe intends them."""
    figure, panels = _make_panels(len(found))
    for axes, (name, comparison) in zip(panels, found.items(), strict=True):
        total = sum(comparison.counts.values())
        values = list(comparison.counts)
        axes.bar(values, [count / total for count in comparison.counts.values()], color=COUNTED, label="built")
        expected = [count / total for count in comparison.expected.values()]
        axes.plot(values, expected, "o", color=INTENDED, ms=4, label="intended")
        axes.set_title(f"{shorten_name(name)}\n{comparison.verdict}", fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.set_xticks(values)
        axes.yaxis.set_major_formatter("{x:.0%}")
    _add_legend(figure, panels[0])
    return figure


def draw_yes_no(found: Mapping[str, Comparison]) -> Figure:
    """Return bars of the share of yes among the answers, a line at the half."""
    figure, axes = _make_bars(len(found))
    shares = [one.counts.get(1, 0) / sum(one.counts.values()) for one in found.values()]
    places = np.arange(len(found))
    axes.barh(places, shares, color=COUNTED, label="yes")
    axes.barh(places, [1 - share for share in shares], left=shares, color="#d5d9e0", label="no")
    axes.axvline(0.5, color=INTENDED, lw=1.5, label="intended")
    axes.set_yticks(places, [shorten_name(name) for name in found])
    _add_legend(figure, axes)
    return figure


def draw_tokens(datasets: Mapping[str, DatasetStatistics]) -> Figure:
    """Return a panel for each data set: lengths in tokens, of the images and of the whole, and ``cutoff_len``."""
    figure, panels = _make_panels(len(datasets))
    for axes, (name, one) in zip(panels, datasets.items(), strict=True):
        for summary, colour, label in ((one.tokens, COUNTED, "all"), (one.visual_tokens, PALETTE[1], "images")):
            shares = [count / one.records for count in summary.bins.values()]
            axes.bar(list(summary.bins), shares, TOKEN_BIN, align="edge", color=colour, alpha=0.7, label=label)
        axes.axvline(one.cutoff_len, color=LIMIT, lw=1.5, label="cutoff_len")
        axes.set_title(shorten_name(name), fontsize=9)
        axes.set_xlabel("tokens", fontsize=8)
        axes.yaxis.set_major_formatter("{x:.0%}")
    _add_legend(figure, panels[0])
    return figure


def draw_identities(identities: Mapping[str, IdentityStatistics]) -> Figure:
    """Return three panels for each source: images and cameras of the identities, positives of the images."""
    figure, panels = _make_panels(3 * len(identities))
    reads: tuple[tuple[str, str, Callable[[IdentityStatistics], dict[int, int]]], ...] = (
        ("images per identity", "identities", lambda one: one.images_per_identity),
        ("cameras per identity", "identities", lambda one: one.cameras_per_identity),
        ("positives in other cameras", "images", lambda one: one.positives_per_image),
    )
    for row, (name, one) in enumerate(identities.items()):
        for axes, (label, counted, read) in zip(panels[3 * row : 3 * row + 3], reads, strict=True):
            counts = read(one)
            largest = max(counts)
            width = max(1, math.ceil((largest + 1) / HISTOGRAM_BINS))
            edges = np.arange(0, largest + width + 1, width) - 0.5
            axes.hist(list(counts), edges, weights=list(counts.values()), color=COUNTED, rwidth=0.9)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel(label, fontsize=8)
            axes.set_ylabel(counted, fontsize=8)
    return figure


def draw_parts(parts: Mapping[str, Mapping[str, int]]) -> Figure:
    """Return one bar for each data set, divided by the share of each named part."""
    figure, axes = _make_bars(len(parts))
    places = np.arange(len(parts))
    left = np.zeros(len(parts))
    names = sorted({name for one in parts.values() for name in one})
    for number, name in enumerate(names):
        shares = np.array([one.get(name, 0) / sum(one.values()) for one in parts.values()])
        axes.barh(places, shares, left=left, color=PALETTE[number % len(PALETTE)], label=name)
        left += shares
    axes.set_yticks(places, [shorten_name(name) for name in parts])
    axes.set_xlim(0, 1)
    _add_legend(figure, axes)
    return figure

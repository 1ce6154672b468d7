"""What ``chatreid stats`` writes: ``stats.json``, a PNG for each topic, and ``stats.html`` with everything inside.

The topics of the page are ``Section``s: a title, what to know about it, a figure and a table. Figures are drawn with
matplotlib's objects, not with pyplot: none stays open behind the caller's back, no screen is needed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .. import __version__
from ..html import embed_png, encode_png, render_template
from ..printing import say
from ..shards import open_atomically, write_text
from .stats import (
    TOKEN_BIN,
    Comparison,
    DatasetStatistics,
    IdentityStatistics,
    Statistics,
    average,
    compute_statistics,
)


TEMPLATE = Path(__file__).with_name("stats.html.j2")

COUNTED, INTENDED, LIMIT, OTHER = "#5b8def", "#1c2330", "#c2362f", "#d5d9e0"
PALETTE = ("#5b8def", "#f0a35e", "#56b08a", "#c98bd6", "#d9705f", "#8d99ae", "#c7b446", "#4fb3c4")
PANELS_IN_ROW = 3
HISTOGRAM_BINS = 40
LEGEND_COLUMNS = 6

GALLERY_TEXT = (
    "N is drawn uniformly from gallery.min_size to gallery.max_size (paper, section 3.2). The recorded N is smaller "
    "than the drawn one where cutoff_len left images out or a source has too few fitting images."
)
MATCH_TEXT = (
    "n is drawn as gallery.matches of the recipe says (equation 1 of the paper); at least 2 in Stage 2 and 1 in "
    "Stage 3. It is smaller than intended where identities have fewer fitting images than were drawn, or where "
    "cutoff_len left some out."
)
TOKEN_TEXT = (
    "Tokens of the images are exact under the stage's image policy; those of the text are estimated at three "
    "characters a token, which is rather too many. Training cuts off what is longer than cutoff_len."
)
TURN_TEXT = (
    "The second turn asks for the images of the person who was confirmed; a third keeps some of them, where their "
    "attributes differ. N and n are those of the first turn."
)
IDENTITY_TEXT = (
    "Training images of each source, as its manifest has them. A positive is an image of the same identity from "
    "another camera: without one an image can be no query, and a gallery cannot have more matches than there are."
)


@dataclass(frozen=True, slots=True)
class Section:
    """One topic.

    Attributes:
        topic: one word, the name of the figure's file.
        title: its heading.
        text: what the figure and the table show.
        figure: None if there is nothing to draw.
        columns: the table's head; the first column is a name, the others are numbers.
        rows: the table's cells as text.
    """

    topic: str
    title: str
    text: str
    figure: Figure | None
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_statistics(dataset_dir: Path, output: Path | None = None) -> Statistics:
    """Compute the statistics of a folder of built data sets, write them and return them.

    Args:
        dataset_dir: the ``output_dir`` of ``chatreid build``.
        output: folder for the files; ``find_output`` if None.

    Raises:
        DataError: the folder holds no built data set, or a damaged one.
    """
    statistics = compute_statistics(dataset_dir)
    output = output or find_output(dataset_dir)
    sections = list(build_sections(statistics))
    pictures = {section.topic: encode_png(section.figure) for section in sections if section.figure is not None}
    for topic, content in pictures.items():
        with open_atomically(output / f"{topic}.png") as temporary:
            temporary.write_bytes(content)
    write_text(output / "stats.json", statistics.to_json() + "\n")
    write_text(output / "stats.html", render_page(statistics, sections, pictures))
    # stdout belongs to the numbers.
    say(f"Written: {output / 'stats.html'}, stats.json and {len(pictures)} PNG figures", aside=True)
    return statistics


def find_output(dataset_dir: Path) -> Path:
    """Return the folder for the statistics: beside the data sets', which training reads and users copy or share."""
    folder = dataset_dir.resolve()
    return folder.with_name(f"{folder.name}_stats")


def render_page(statistics: Statistics, sections: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """Return the HTML of the page; ``pictures`` are PNG files by topic."""
    embedded = {topic: embed_png(content) for topic, content in pictures.items()}
    return render_template(TEMPLATE, statistics=statistics, sections=sections, pictures=embedded, version=__version__)


def build_sections(statistics: Statistics) -> Iterator[Section]:
    """Yield the topics that the data sets allow, in the order of the page."""
    datasets = {name.removeprefix("chatreid_"): one for name, one in statistics.datasets.items()}
    yield _build_record_section(statistics.stages, datasets)
    if sizes := {name: one.gallery_sizes for name, one in datasets.items() if one.gallery_sizes}:
        yield _build_comparison_section("galleries", "Gallery sizes N", GALLERY_TEXT, sizes, "gallery images N")
    if matches := {name: one.matches for name, one in datasets.items() if one.matches}:
        yield _build_comparison_section("matches", "Matches n", MATCH_TEXT, matches, "matches n")
    if answers := {name: one.yes_no for name, one in datasets.items() if one.yes_no}:
        yield _build_answer_section(answers)
    yield _build_token_section(datasets)
    yield _build_identity_section(statistics)
    sources = {name: one.sources for name, one in datasets.items()}
    yield _build_part_section("sources", "Source data sets", "Where the query of each record comes from.", sources)
    wordings = {name: {f"wording {key}": n for key, n in one.variants.items()} for name, one in datasets.items()}
    text = "Wording 0 is the paper's; tasks differ in how many they have."
    yield _build_part_section("wordings", "Wordings of the prompts", text, wordings)
    dialogues = {name: one.turns for name, one in datasets.items() if set(one.turns) - {1}}
    if turns := {name: {f"{key} turns": n for key, n in one.items()} for name, one in dialogues.items()}:
        yield _build_part_section("turns", "Turns of the dialogues", TURN_TEXT, turns)


# ---- One section each: its table and its figure ----


def _build_record_section(stages: Mapping[int, int], datasets: Mapping[str, DatasetStatistics]) -> Section:
    totals = ", ".join(f"Stage {stage}: {count:,}" for stage, count in stages.items())
    return Section(
        "records",
        "Records per task",
        f"{totals}. Intended shares are the recipe's ratios over the tasks that could be built.",
        draw_records(datasets),
        ("data set", "stage", "records", "share of stage", "intended"),
        [
            (name, str(one.stage), f"{one.records:,}", f"{one.share:.2%}", f"{one.intended_share:.2%}")
            for name, one in datasets.items()
        ],
    )


def draw_records(datasets: Mapping[str, DatasetStatistics]) -> Figure:
    """Return bars of each task's share in its stage, the intended share marked."""
    figure, axes, places = _make_bars(datasets)
    shares = [one.share for one in datasets.values()]
    intended = [one.intended_share for one in datasets.values()]
    axes.barh(places, shares, color=COUNTED, label="built")
    axes.plot(intended, places, "|", color=INTENDED, ms=16, mew=2, label="intended")
    for place, one in zip(places, datasets.values(), strict=True):
        axes.annotate(
            f" {one.records:,}", (one.share, place), va="center", fontsize=8, xytext=(4, 0), textcoords="offset points"
        )
    axes.set_xlabel("share of the stage's records (number of records beside the bar)", fontsize=9)
    axes.set_xlim(0, 1.15)
    _add_legend(figure, axes)
    return figure


def _build_comparison_section(
    topic: str, title: str, text: str, found: Mapping[str, Comparison], label: str
) -> Section:
    """Return a table of means, and a panel for each data set: bars of what was counted, dots of what is intended."""
    figure, panels = _make_panels(len(found))
    for axes, (name, one) in zip(panels, found.items(), strict=True):
        total = sum(one.counts.values())
        axes.bar(list(one.counts), [count / total for count in one.counts.values()], color=COUNTED, label="built")
        expected = [count / total for count in one.expected.values()]
        axes.plot(list(one.expected), expected, "o", color=INTENDED, ms=4, label="intended")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.set_xticks(list(one.counts))
        axes.yaxis.set_major_formatter("{x:.0%}")
    _add_legend(figure, panels[0])
    rows = [(name, f"{one.mean:.3f}", f"{one.expected_mean:.3f}") for name, one in found.items()]
    return Section(topic, title, text, figure, ("data set", "mean", "intended mean"), rows)


def _build_answer_section(found: Mapping[str, Comparison]) -> Section:
    figure, axes, places = _make_bars(found)
    shares = [one.mean for one in found.values()]
    axes.barh(places, shares, color=COUNTED, label="yes")
    axes.barh(places, [1 - share for share in shares], left=shares, color=OTHER, label="no")
    axes.axvline(0.5, color=INTENDED, lw=1.5, label="intended")
    _add_legend(figure, axes)
    rows = [
        (name, f"{one.counts[1]:,}", f"{one.counts[0]:,}", f"{one.mean:.2%}", f"{one.expected_mean:.2%}")
        for name, one in found.items()
    ]
    text = "Half of the questions are to be answered by yes (paper, section 3.1.2)."
    return Section("answers", "Yes and no", text, figure, ("data set", "yes", "no", "share of yes", "intended"), rows)


def _build_token_section(datasets: Mapping[str, DatasetStatistics]) -> Section:
    """Return a table of lengths, and a panel for each data set: lengths of the images and of the whole."""
    figure, panels = _make_panels(len(datasets))
    for axes, (name, one) in zip(panels, datasets.items(), strict=True):
        for summary, colour, label in ((one.tokens, COUNTED, "all"), (one.visual_tokens, PALETTE[1], "images")):
            shares = [count / one.records for count in summary.bins.values()]
            axes.bar(list(summary.bins), shares, TOKEN_BIN, align="edge", color=colour, alpha=0.7, label=label)
        axes.axvline(one.cutoff_len, color=LIMIT, lw=1.5, label="cutoff_len")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("tokens", fontsize=8)
        axes.yaxis.set_major_formatter("{x:.0%}")
    _add_legend(figure, panels[0])
    rows: list[Sequence[str]] = []
    for name, one in datasets.items():
        numbers = (one.visual_tokens.median, one.visual_tokens.largest, one.tokens.median, one.tokens.p99)
        numbers += (one.tokens.largest, one.cutoff_len, one.above_cutoff)
        rows.append((name, *(f"{number:,}" for number in numbers)))
    columns = ("data set", "images: median", "longest", "all: median", "99 %", "longest", "cutoff_len", "above it")
    unknown = sum(one.unknown_sizes for one in datasets.values())
    text = TOKEN_TEXT + (f" {unknown:,} image(s) of unknown size are counted as 0 tokens." if unknown else "")
    return Section("tokens", "Token lengths", text, figure, columns, rows)


def _build_identity_section(statistics: Statistics) -> Section:
    rows: list[Sequence[str]] = []
    for name, one in statistics.identities.items():
        counts = (one.identities, one.images, one.cameras)
        means = (one.images / one.identities, average(one.cameras_per_identity), average(one.positives_per_image))
        numbers = [f"{count:,}" for count in counts] + [f"{mean:.1f}" for mean in means]
        numbers.insert(-1, f"{one.cameras_per_identity.get(1, 0):,}")
        rows.append((name, *numbers))
    columns = ("source", "identities", "images", "cameras", "images each", "cameras each", "in one camera only")
    missing = [f" {name}: {reason}." for name, reason in statistics.identities_left_out.items()]
    return Section(
        "identities",
        "Positives per identity",
        IDENTITY_TEXT + "".join(missing),
        _draw_identities(statistics.identities) if statistics.identities else None,
        (*columns, "positives per image"),
        rows,
    )


def _draw_identities(identities: Mapping[str, IdentityStatistics]) -> Figure:
    """Return three panels for each source: images and cameras of the identities, positives of the images."""
    figure, panels = _make_panels(3 * len(identities))
    for row, (name, one) in enumerate(identities.items()):
        histograms = (
            ("images per identity", "identities", one.images_per_identity),
            ("cameras per identity", "identities", one.cameras_per_identity),
            ("positives in other cameras", "images", one.positives_per_image),
        )
        for axes, (label, counted, counts) in zip(panels[3 * row : 3 * row + 3], histograms, strict=True):
            largest = max(counts)
            width = max(1, math.ceil((largest + 1) / HISTOGRAM_BINS))
            edges = np.arange(0, largest + width + 1, width) - 0.5
            axes.hist(list(counts), edges, weights=list(counts.values()), color=COUNTED, rwidth=0.9)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel(label, fontsize=8)
            axes.set_ylabel(counted, fontsize=8)
    return figure


def _build_part_section(topic: str, title: str, text: str, parts: Mapping[str, Mapping[str, int]]) -> Section:
    """Return a table of shares, and one bar for each data set, divided by them."""
    figure, axes, places = _make_bars(parts)
    names = sorted({name for one in parts.values() for name in one})
    shares = np.array([[one.get(name, 0) / sum(one.values()) for name in names] for one in parts.values()])
    left = np.cumsum(shares, axis=1) - shares
    for number, name in enumerate(names):
        colour = PALETTE[number % len(PALETTE)]
        axes.barh(places, shares[:, number], left=left[:, number], color=colour, label=name)
    axes.set_xlim(0, 1)
    _add_legend(figure, axes)
    rows = [(name, *(f"{share:.1%}" for share in row)) for name, row in zip(parts, shares.tolist(), strict=True)]
    return Section(topic, title, text, figure, ("data set", *names), rows)


# ---- What the figures share ----


def _clean_axes(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#e3e7ee")


def _make_panels(count: int) -> tuple[Figure, list[Any]]:
    columns = min(count, PANELS_IN_ROW)
    rows = math.ceil(count / columns)
    # A lone panel is as wide as two, or its title does not fit.
    figure = Figure(figsize=(4.0 * max(columns, 2), 2.5 * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[:count]:
        _clean_axes(axes, "y")
    return figure, panels[:count]


def _make_bars(names: Mapping[str, Any]) -> tuple[Figure, Any, list[int]]:
    """Return a figure for one lying bar a name, and the bars' places."""
    figure = Figure(figsize=(9.5, 1.3 + 0.34 * len(names)), layout="constrained")
    axes: Any = figure.subplots()
    _clean_axes(axes, "x")
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:.0%}")
    places = list(range(len(names)))
    axes.set_yticks(places, list(names))
    return figure, axes, places


def _add_legend(figure: Figure, axes: Any) -> None:
    """Put the legend of one panel above all of them, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=LEGEND_COLUMNS, loc="outside upper center", frameon=False)

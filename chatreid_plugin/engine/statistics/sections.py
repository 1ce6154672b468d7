"""The topics of the statistics page: of each a title, what to know about it, a figure and a table."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from .expectations import SIGNIFICANCE, Comparison
from .figures import (
    draw_comparisons,
    draw_identities,
    draw_parts,
    draw_records,
    draw_tokens,
    draw_yes_no,
    shorten_name,
)
from .report import DatasetStatistics, Statistics


@dataclass(frozen=True, slots=True)
class Section:
    """One topic.

    Attributes:
        topic: one word, the name of the figure's file.
        title: its heading.
        text: what the figure and the table show.
        figure: None if there is nothing to draw.
        columns: the table's head; the first column is a name, the others are numbers or short words.
        rows: the table's cells as text.
    """

    topic: str
    title: str
    text: str
    figure: Figure | None
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


_TEST = (
    f"p is that of a chi-square test; below {SIGNIFICANCE} the records differ from the recipe. "
    "Small sets may have too few records for a test."
)
GALLERY_TEXT = (
    "N is drawn uniformly from gallery.min_size to gallery.max_size (paper, section 3.2). The recorded N is smaller "
    f"than the drawn one where cutoff_len left images out or a source has too few fitting images. {_TEST}"
)
MATCH_TEXT = (
    "n is drawn as gallery.matches of the recipe says (equation 1 of the paper); at least 2 in Stage 2 and 1 in "
    "Stage 3. “Limited by data”: the test fails and n is smaller than intended, because identities have fewer fitting "
    f"images than were drawn, or because cutoff_len left some out. {_TEST}"
)
YES_NO_TEXT = f"Half of the questions are to be answered by yes (paper, section 3.1.2). {_TEST}"
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


def build_sections(statistics: Statistics) -> Iterator[Section]:
    """Yield the topics that the data sets allow, in the order of the page."""
    datasets = statistics.datasets
    yield _build_record_section(statistics)
    topics: tuple[tuple[str, str, str, str, Callable[[DatasetStatistics], Comparison | None]], ...] = (
        ("galleries", "Gallery sizes N", GALLERY_TEXT, "gallery images N", lambda one: one.gallery_sizes),
        ("matches", "Matches n", MATCH_TEXT, "matches n", lambda one: one.matches),
    )
    for topic, title, text, label, read in topics:
        found = {name: comparison for name, one in datasets.items() if (comparison := read(one)) is not None}
        if found:
            columns, rows = _tabulate_comparisons(found)
            yield Section(topic, title, text, draw_comparisons(found, label), columns, rows)
    answers = {name: one.yes_no for name, one in datasets.items() if one.yes_no is not None}
    if answers:
        yield _build_answer_section(answers)
    yield _build_token_section(datasets)
    yield _build_identity_section(statistics)
    sources = {name: one.sources for name, one in datasets.items()}
    yield _build_part_section("sources", "Source data sets", "Where the query of each record comes from.", sources)
    wordings = {
        name: {f"wording {number}": count for number, count in one.variants.items()} for name, one in datasets.items()
    }
    yield _build_part_section(
        "wordings",
        "Wordings of the prompts",
        "Wording 0 is the paper's; tasks differ in how many they have.",
        wordings,
    )
    turns = {
        name: {f"{number} turns": count for number, count in one.turns.items()}
        for name, one in datasets.items()
        if max(one.turns, default=1) > 1
    }
    if turns:
        yield _build_part_section("turns", "Turns of the dialogues", TURN_TEXT, turns)


def _build_record_section(statistics: Statistics) -> Section:
    rows = [
        (shorten_name(name), str(one.stage), f"{one.records:,}", f"{one.share:.2%}", f"{one.intended_share:.2%}")
        for name, one in statistics.datasets.items()
    ]
    totals = ", ".join(f"Stage {stage}: {count:,}" for stage, count in statistics.stages.items())
    return Section(
        "records",
        "Records per task",
        f"{totals}. Intended shares are the recipe's ratios over the tasks that could be built.",
        draw_records(statistics),
        ("data set", "stage", "records", "share of stage", "intended"),
        rows,
    )


def _format_p_value(found: Comparison) -> str:
    return "–" if found.p_value is None else f"{found.p_value:.3g}"


def _tabulate_comparisons(found: dict[str, Comparison]) -> tuple[Sequence[str], list[Sequence[str]]]:
    rows: list[Sequence[str]] = []
    for name, one in found.items():
        total = sum(one.counts.values())
        counted = sum(value * count for value, count in one.counts.items()) / total
        intended = sum(value * count for value, count in one.expected.items()) / total
        rows.append((shorten_name(name), f"{counted:.3f}", f"{intended:.3f}", _format_p_value(one), one.verdict))
    return ("data set", "mean", "intended mean", "p", "verdict"), rows


def _build_answer_section(found: dict[str, Comparison]) -> Section:
    rows = [
        (
            shorten_name(name),
            f"{one.counts.get(1, 0):,}",
            f"{one.counts.get(0, 0):,}",
            _format_p_value(one),
            one.verdict,
        )
        for name, one in found.items()
    ]
    columns = ("data set", "yes", "no", "p", "verdict")
    return Section("answers", "Yes and no", YES_NO_TEXT, draw_yes_no(found), columns, rows)


def _build_token_section(datasets: dict[str, DatasetStatistics]) -> Section:
    rows = [
        (
            shorten_name(name),
            *(f"{value:,}" for value in (one.visual_tokens.median, one.visual_tokens.largest)),
            *(f"{value:,}" for value in (one.tokens.median, one.tokens.p99, one.tokens.largest)),
            f"{one.cutoff_len:,}",
            f"{one.above_cutoff:,}",
        )
        for name, one in datasets.items()
    ]
    columns = ("data set", "images: median", "longest", "all: median", "99 %", "longest", "cutoff_len", "above it")
    unknown = sum(one.unknown_sizes for one in datasets.values())
    text = TOKEN_TEXT + (f" {unknown:,} image(s) of unknown size are counted as 0 tokens." if unknown else "")
    return Section("tokens", "Token lengths", text, draw_tokens(datasets), columns, rows)


def _build_identity_section(statistics: Statistics) -> Section:
    rows = [
        (
            name,
            *(f"{value:,}" for value in (one.identities, one.images, one.cameras)),
            f"{one.images / one.identities:.1f}",
            f"{sum(cameras * people for cameras, people in one.cameras_per_identity.items()) / one.identities:.1f}",
            f"{one.cameras_per_identity.get(1, 0):,}",
            f"{sum(others * images for others, images in one.positives_per_image.items()) / one.images:.1f}",
        )
        for name, one in statistics.identities.items()
    ]
    columns = ("source", "identities", "images", "cameras", "images each", "cameras each", "in one camera only")
    missing = [f" {name}: {reason}." for name, reason in statistics.identities_left_out.items()]
    return Section(
        "identities",
        "Positives per identity",
        IDENTITY_TEXT + "".join(missing),
        draw_identities(statistics.identities) if statistics.identities else None,
        (*columns, "positives per image"),
        rows,
    )


def _build_part_section(topic: str, title: str, text: str, parts: dict[str, dict[str, int]]) -> Section:
    names = sorted({name for one in parts.values() for name in one})
    rows = [
        (shorten_name(name), *(f"{one.get(part, 0) / sum(one.values()):.1%}" for part in names))
        for name, one in parts.items()
    ]
    return Section(topic, title, text, draw_parts(parts), ("data set", *names), rows)

"""What ``chatreid list`` and ``chatreid inspect`` show, no image opened.

``list``: the catalog as a table, one entry whole, or JSON. ``inspect``: what a parser finds in a raw folder.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import SourceSettings
from ..datasets.catalog import CatalogEntry, Count, get_variant, read_catalog, refuse_withdrawn
from ..datasets.listing import Crop, find_shared_people
from ..datasets.registry import list_source
from ..errors import ConfigError
from ..printing import render_table
from ..records import Split


SPLITS: tuple[Split, ...] = ("train", "val", "query", "gallery")
LEGEND = (
    "Counts: images/identities/captions as published, then V counted in the published files, P stated by the authors, "
    "K widely reported (differences only warn).\nOne entry whole: chatreid list NAME"
)
# A value of `protocol` longer than this is described by its size.
_SHORTEST_SUMMARY = 100


# ---- chatreid list ----


def render_catalog() -> str:
    """Return a table of all data sets; a set with variants has a line for each."""
    columns = ("NAME", "TITLE", "SETTING", *(split.upper() for split in SPLITS), "USED FOR")
    rows: list[tuple[str, ...]] = []
    for name, entry in read_catalog().items():
        for variant in entry.variants or ("default",):
            shown = f"{name}:{variant}" if entry.variants else name
            counts = entry.counts.get(variant, {})
            cells = [_format_count(counts[split]) if split in counts else "-" for split in SPLITS]
            rows.append((shown, entry.title, entry.setting, *cells, entry.used_for))
    return f"{render_table(columns, rows, words=len(columns))}\n\n{LEGEND}"


def render_entry(name: str) -> str:
    """Return everything about one data set.

    Raises:
        ConfigError: no such data set, or one that was withdrawn.
    """
    entry = find_entry(name)
    lines = [
        f"{simplify_name(name)}: {entry.title} ({entry.setting})",
        f"used for   {entry.used_for}",
        f"labels     {', '.join(('identity', *entry.labels))}",
        f"variants   {', '.join(entry.variants) or 'none'}"
        + (" (the first is the default)" if entry.variants else ""),
        f"file name  {entry.file_name}",
        "layout",
        *(f"  {line}" for line in entry.layout.rstrip().splitlines()),
        "counts",
        *(f"  {line}" for line in _list_counts(entry)),
        f"licence    {entry.licence}",
        f"ask at     {entry.source}",
    ]
    return "\n".join(lines)


def dump_catalog(name: str | None = None) -> str:
    """Return the catalog, or one entry of it, as JSON: name -> entry, or the entry with its ``name``.

    Raises:
        ConfigError: no such data set, or one that was withdrawn.
    """
    if name is None:
        value = {key: entry.model_dump(mode="json") for key, entry in read_catalog().items()}
    else:
        value = {"name": simplify_name(name), **find_entry(name).model_dump(mode="json")}
    return json.dumps(value, indent=2, ensure_ascii=False)


def simplify_name(name: str) -> str:
    """Return a data set's name as the catalog writes it: ``Market-1501`` -> ``market1501``."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_entry(name: str) -> CatalogEntry:
    """Return the entry of a data set, however its name is written (``Market-1501`` is ``market1501``).

    Raises:
        ConfigError: no such data set, or one that was withdrawn.
    """
    catalog = read_catalog()
    key = simplify_name(name)
    if key:
        refuse_withdrawn(SourceSettings(name=key, root=Path()))
    if key not in catalog:
        raise ConfigError(f"There is no data set {name!r}. `chatreid list` shows {', '.join(catalog)}.")
    return catalog[key]


def _format_count(count: Count) -> str:
    """``12,936/751 V``; what nobody says is a question mark, or left out at the end."""
    numbers = [count.images, count.identities, count.captions]
    while numbers and numbers[-1] is None:
        numbers.pop()
    return "/".join("?" if number is None else f"{number:,}" for number in numbers) + f" {count.confidence}"


def _list_counts(entry: CatalogEntry) -> list[str]:
    columns = ("variant", "split", "images", "identities", "captions", "confidence")
    rows: list[tuple[str, ...]] = []
    for variant, counts in entry.counts.items():
        for split, count in counts.items():
            numbers = (count.images, count.identities, count.captions)
            cells = ("?" if number is None else f"{number:,}" for number in numbers)
            rows.append((variant, split, *cells, count.confidence))
    return render_table(columns, rows, words=len(columns)).splitlines() if rows else ["none published"]


# ---- chatreid inspect ----


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """What one split has.

    Attributes:
        split: ``train``, ``val``, ``query`` or ``gallery``.
        images: number of images.
        identities: number of people.
        cameras: number of cameras; as many as images where the set names none.
        clothes: number of outfits, counted within each person; 0 where the set labels none.
        modalities: modality -> number of images.
        captions: number of captions.
        attributed: number of images with attributes.
        example: the first record.
    """

    split: str
    images: int
    identities: int
    cameras: int
    clothes: int
    modalities: dict[str, int]
    captions: int
    attributed: int
    example: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ListingSummary:
    """What a parser found: splits, what it left out and why, warnings, and the evaluation's protocol in short."""

    name: str
    variant: str | None
    trial: int
    root: str
    splits: tuple[SplitSummary, ...]
    skipped: dict[str, int]
    warnings: tuple[str, ...]
    protocol: dict[str, Any]

    def to_json(self) -> str:
        """Return the summary as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def render(self) -> str:
        """Return the summary as text."""
        variant = f", variant {self.variant}" if self.variant else ""
        columns = ("SPLIT", "IMAGES", "IDENTITIES", "CAMERAS", "CLOTHES", "CAPTIONS", "ATTRIBUTES", "MODALITIES")
        rows: list[tuple[str, ...]] = []
        for split in self.splits:
            modalities = ", ".join(f"{count:,} {name}" for name, count in split.modalities.items())
            numbers = (split.images, split.identities, split.cameras, split.clothes, split.captions, split.attributed)
            rows.append((split.split, *(f"{number:,}" for number in numbers), modalities))
        lines = [
            f"{self.name}{variant}, trial {self.trial}: {self.root}",
            "",
            render_table(columns, rows, words=len(columns)),
        ]
        for split in self.splits:
            lines += [
                "",
                f"example of {split.split}",
                *(f"  {key}: {value}" for key, value in split.example.items() if value),
            ]
        parts = (
            ("left out", [f"{count:,}: {reason}" for reason, count in sorted(self.skipped.items())]),
            ("protocol", [f"{key}: {value}" for key, value in self.protocol.items()]),
            ("warnings", self.warnings),
        )
        for title, items in parts:
            if items:
                lines += ["", title, *(f"  {item}" for item in items)]
        return "\n".join(lines)


def inspect_source(
    name: str,
    root: Path,
    variant: str | None = None,
    trial: int = 1,
    pattern: str | None = None,
    labels: Path | None = None,
) -> ListingSummary:
    """List a raw data set and sum up what is there; counts that differ from the published ones are warnings.

    Args:
        name: of the data set, as in the catalog.
        root: its folder.
        variant: a form of it; the default one if None.
        trial: which of its published splits.
        pattern: of the paths, for the ``pattern`` parser.
        labels: the label file, for the ``list`` parser and text-to-image sets.

    Raises:
        ConfigError: no such data set, variant or trial, or a data set that was withdrawn.
        DataError: the folder does not hold this data set.
    """
    entry = find_entry(name)
    source = SourceSettings(
        name=simplify_name(name),
        root=root,
        variant=variant,
        trial=trial,
        pattern=pattern,
        labels=labels,
        allow_count_mismatch=True,
    )
    listing = list_source(source)
    return ListingSummary(
        name=source.name,
        variant=get_variant(source) if entry.variants else None,
        trial=trial,
        root=str(listing.root),
        splits=tuple(_sum_up_splits(listing.crops)),
        skipped=listing.skipped,
        warnings=tuple(dict.fromkeys([*listing.warnings, *find_shared_people(listing.crops)])),
        protocol={key: _shorten(value) for key, value in listing.protocol.items()},
    )


def _sum_up_splits(crops: Sequence[Crop]) -> list[SplitSummary]:
    summaries: list[SplitSummary] = []
    for split in SPLITS:
        chosen = [crop for crop in crops if crop.split == split]
        if not chosen:
            continue
        summary = SplitSummary(
            split=split,
            images=len(chosen),
            identities=len({crop.person for crop in chosen}),
            cameras=len({crop.camera for crop in chosen}),
            clothes=len({(crop.person, crop.clothes) for crop in chosen if crop.clothes is not None}),
            modalities=dict(Counter(crop.modality for crop in chosen)),
            captions=sum(bool(caption) for crop in chosen for caption in crop.captions),
            attributed=sum(bool(crop.attributes) for crop in chosen),
            example=asdict(min(chosen, key=lambda crop: crop.path)),
        )
        summaries.append(summary)
    return summaries


def _shorten(value: Any) -> Any:
    """Return a protocol's value, or its size if it is long (published permutations, tracklets)."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= _SHORTEST_SUMMARY or not isinstance(value, (dict, list)):
        return value
    return f"{len(value):,} entries, from {text[:40]} ..."

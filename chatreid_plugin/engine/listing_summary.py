"""What ``chatreid inspect`` shows: what a parser finds in a folder, without opening an image."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import SourceSettings
from .catalog import get_variant
from .catalog_view import SPLITS, align_columns, find_entry, simplify_name
from .listing import Crop, find_shared_people
from .parsing import list_source


# A value of `protocol` longer than this is described by its size.
_SHORTEST_SUMMARY = 100


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
        head = ("SPLIT", "IMAGES", "IDENTITIES", "CAMERAS", "CLOTHES", "CAPTIONS", "ATTRIBUTES", "MODALITIES")
        rows: list[tuple[str, ...]] = [head]
        for split in self.splits:
            modalities = ", ".join(f"{count:,} {name}" for name, count in split.modalities.items())
            numbers = (split.images, split.identities, split.cameras, split.clothes, split.captions, split.attributed)
            rows.append((split.split, *(f"{number:,}" for number in numbers), modalities))
        lines = [f"{self.name}{variant}, trial {self.trial}: {self.root}", "", align_columns(rows)]
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

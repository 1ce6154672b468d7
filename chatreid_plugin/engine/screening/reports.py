"""What ``chatreid filter`` and ``chatreid audit`` do: manifests are read and judged, before anything is built."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ...config import BuildSettings, QualitySettings, SourceSettings
from ...errors import ConfigError, DataError
from ...pixels import open_crop, save_image
from ...shards import open_atomically, read_manifest_provenance, read_manifest_table, select_splits, write_text
from ..manifests import find_manifest, is_current, list_tested
from .audit import AuditReport, audit_images, check_table_name, write_leaks
from .quality import find_drops


_EXAMPLES = 8
# What engine/manifests.py calls it.
_UNDECODABLE = "cannot be decoded"
# Of a contact sheet, in pixels.
_CELL = (96, 192)
_GAP = 8
_LINE = 18
_FONT_SIZE = 12
_COLUMNS = 8
_PAPER, _INK, _GREY = "white", "black", "#b0b0b0"

# Of a contact sheet: the line above a row, and at most 8 image files with the text below each.
SheetRow = tuple[str, Sequence[tuple[Path, str]]]


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What ``quality`` does to the training images of one source.

    Attributes:
        name: the source.
        images: training images of its manifest.
        dropped: reason -> number of them that go, in the order of the checks.
        undecodable: images of all splits that were left out when the source was parsed, as they cannot be decoded.
        sheet: the contact sheet; None if nothing goes.
        drop_file: the list of what goes; None after a dry run.
    """

    name: str
    images: int
    dropped: dict[str, int]
    undecodable: int
    sheet: Path | None
    drop_file: Path | None


@dataclass(frozen=True, slots=True)
class FilterReport:
    """What ``quality`` does to each source that trains one of its ``stages``."""

    stages: tuple[int, ...]
    sources: list[SourceReport] = field(default_factory=list[SourceReport])

    def render(self) -> str:
        """Return the report as text."""
        lines: list[str] = []
        for source in self.sources:
            gone = sum(source.dropped.values())
            lines.append(
                f"{source.name}: {gone:,} of {source.images:,} training images go{_share(gone, source.images)}"
            )
            for reason, count in source.dropped.items():
                lines.append(f"  {reason:<22}{count:>10,}{_share(count, source.images)}")
            if source.undecodable:
                lines.append(f"  {_UNDECODABLE:<22}{source.undecodable:>10,} (any split, left out when parsed)")
            lines += [f"  {path}" for path in (source.sheet, source.drop_file) if path is not None]
        if any(source.dropped for source in self.sources):
            lines.append(f"What goes is left out of Stage {' and '.join(map(str, self.stages))} (quality.stages).")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps({"sources": [asdict(source) for source in self.sources]}, indent=2, default=str)


def _share(count: int, total: int) -> str:
    return f" ({count / total:.2%})" if total else ""


def _read_source(settings: BuildSettings, source: SourceSettings) -> tuple[pa.Table, Path]:
    path = find_manifest(settings, source.name)
    if not is_current(path, source):
        raise DataError(
            f"Source {source.name}: manifest {path} is missing or was made from other settings. "
            "Run `chatreid parse CONFIG` first."
        )
    return read_manifest_table(path)


def filter_sources(settings: BuildSettings, dry_run: bool = False) -> FilterReport:
    """Apply ``quality`` to the training images of each source and show examples of what goes.

    Writes ``<source>.quality.png`` (up to 8 examples for each reason) beside the manifest and, unless it is a dry run,
    ``<source>.dropped.jsonl`` (path, reason, value). Manifests stay as they are: a build filters what it reads. Test
    images are never filtered.

    Raises:
        ConfigError: the recipe has no ``quality``.
        DataError: a manifest is missing or out of date.
    """
    if settings.quality is None:
        raise ConfigError(
            "The recipe says `quality: null`, which keeps every image. Say quality={} here for the defaults."
        )
    report = FilterReport(settings.quality.stages)
    for source in settings.sources:
        if set(source.stages) & set(settings.quality.stages):
            report.sources.append(_filter_source(settings, source, settings.quality, dry_run))
    return report


def _filter_source(
    settings: BuildSettings, source: SourceSettings, quality: QualitySettings, dry_run: bool
) -> SourceReport:
    manifest = find_manifest(settings, source.name)
    table, root = _read_source(settings, source)
    training = select_splits(table, "train")
    dropped = find_drops(training, quality)
    paths: list[str] = training["path"].take(pa.array([drop.row for drop in dropped], pa.int64())).to_pylist()
    counts = Counter(drop.reason for drop in dropped)
    reasons = {reason: counts[reason] for reason in QualitySettings.model_fields if reason in counts}
    sheet = manifest.with_name(f"{source.name}.quality.png")
    if dropped:
        rows: list[SheetRow] = []
        for reason, count in reasons.items():
            own = ((path, drop) for path, drop in zip(paths, dropped, strict=True) if drop.reason == reason)
            found = [(root / path, f"{drop.value:.4g}") for path, drop in own]
            # Spread over the source, whose neighbours show the same person.
            chosen = [found[place * count // _EXAMPLES] for place in range(_EXAMPLES)] if count > _EXAMPLES else found
            rows.append((f"{reason} {getattr(quality, reason):g}: {count:,} of {len(training):,} images", chosen))
        write_contact_sheet(sheet, rows)
    else:
        # One of an earlier run would show images that stay now.
        sheet.unlink(missing_ok=True)
    drop_file = manifest.with_name(f"{source.name}.dropped.jsonl")
    if not dry_run:
        lines = [
            {"path": path, "reason": drop.reason, "value": round(drop.value, 4)}
            for path, drop in zip(paths, dropped, strict=True)
        ]
        write_text(drop_file, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
    skipped = read_manifest_provenance(manifest).get("skipped")
    return SourceReport(
        name=source.name,
        images=len(training),
        dropped=reasons,
        undecodable=skipped.get(_UNDECODABLE, 0) if isinstance(skipped, dict) else 0,
        sheet=sheet if dropped else None,
        drop_file=None if dry_run else drop_file,
    )


def audit_sources(settings: BuildSettings, write: Path | None = None) -> AuditReport:
    """Compare the training images of the sources with the test images of all sources and of ``audit_against``.

    Args:
        settings: the recipe; a source without ``stages`` is tested only.
        write: a file for all leaks, CSV or JSON Lines by its ending.

    Raises:
        ConfigError: ``write`` has another ending.
        DataError: a manifest is missing or out of date.
    """
    if write is not None:
        check_table_name(write)
    tables = [(source, _read_source(settings, source)[0]) for source in settings.sources]
    tested = list_tested([table for _, table in tables], settings)
    training = [select_splits(table, "train") for source, table in tables if source.stages]
    report = audit_images(pa.concat_tables([*training, tested.slice(0, 0)]), tested, settings.audit_bits)
    if write is not None:
        write_leaks(write, report.leaks)
    return report


def draw_contact_sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """Return an RGB picture of the rows; an image that cannot be read is a grey box.

    Crops are scaled to fit 96 x 192 pixels, their shape kept.
    """
    height = 2 * _LINE + _CELL[1] + _GAP
    sheet = Image.new("RGB", (_GAP + _COLUMNS * (_CELL[0] + _GAP), _GAP + height * len(rows)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for number, (label, cells) in enumerate(rows):
        top = _GAP + height * number
        draw.text((_GAP, top), label, _INK, font)
        for column, (path, text) in enumerate(cells[:_COLUMNS]):
            left = _GAP + column * (_CELL[0] + _GAP)
            sheet.paste(_draw_cell(path), (left, top + _LINE))
            draw.text((left, top + _LINE + _CELL[1]), text, _INK, font)
    return sheet


def _draw_cell(path: Path) -> Image.Image:
    try:
        crop = open_crop(path)
    except DataError:
        return Image.new("RGB", _CELL, _GREY)
    return ImageOps.pad(crop, _CELL, color=_PAPER)


def write_contact_sheet(path: Path, rows: Sequence[SheetRow]) -> None:
    """Write a contact sheet as PNG, atomically."""
    with open_atomically(path) as temporary:
        save_image(draw_contact_sheet(rows), temporary, format="PNG")

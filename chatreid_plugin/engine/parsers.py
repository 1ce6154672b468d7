"""Raw data set folders become ImageRecords: Market-1501's published layout, and a pattern for any folder of crops.

Rules and counts: shared notes on protocols; Market-1501 counts were taken from its published label files.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..config import SourceSettings
from ..crops import DAMAGE
from ..errors import ConfigError, DataError
from ..records import ImageRecord, Split
from .annotations import attach_annotations


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

# Basename grammar of Market-1501, anchored: peers search the whole path, where a parent folder such as
# `2024_c1run` is taken for a camera.
MARKET_NAME = re.compile(r"(?P<person>-1|\d{4})_c(?P<camera>[1-6])s\d_\d{6}_\d{2}\.jpg", re.IGNORECASE | re.ASCII)
MARKET_FOLDERS: dict[str, Split] = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
# Images per folder, junk (-1) included; counted from the published train_label, queryID and testID files.
MARKET_COUNTS = {"bounding_box_train": 12936, "query": 3368, "bounding_box_test": 19732}
MARKET_JUNK = "-1"


@dataclass(slots=True)
class ParseReport:
    """What was read and what was left out, with reasons.

    Attributes:
        root: the folder that the records' paths are relative to.
        records: the ImageRecords, sorted by path.
        skipped: reason -> number of files left out.
        warnings: things that are allowed but unusual.
    """

    root: Path
    records: list[ImageRecord] = field(default_factory=list[ImageRecord])
    skipped: dict[str, int] = field(default_factory=dict[str, int])
    warnings: list[str] = field(default_factory=list[str])

    def skip(self, reason: str) -> None:
        """Count one file that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def find_images(folder: Path, report: ParseReport) -> Iterator[Path]:
    """Yield image files below ``folder`` in sorted order; hidden files and leftovers of other systems are skipped."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__MACOSX" and not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or not name.lower().endswith(IMAGE_SUFFIXES):
                report.skip("not an image file")
            else:
                yield Path(parent) / name


def read_image_size(path: Path) -> tuple[int, int]:
    """Decode an image once and return (width, height): a crop that cannot be decoded is found now, not in training.

    Raises:
        DataError: the file is empty, cut short or no image.
    """
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes). Copy it again or remove it.")
        with Image.open(path) as image:
            image.load()
            return image.size
    except DAMAGE as error:
        raise DataError(f"{path} cannot be decoded: {error}. Copy it again or remove it.") from None


def _add_record(
    report: ParseReport,
    source: SourceSettings,
    path: Path,
    split: Split,
    person: str,
    camera: str,
    clothes: str | None,
) -> None:
    relative = path.relative_to(report.root).as_posix()
    width, height = read_image_size(path)
    record = ImageRecord(
        image_id=f"{source.name}/{relative}",
        dataset=source.name,
        split=split,
        path=relative,
        person_id=f"{source.name}:{person}",
        camera_id=camera,
        width=width,
        height=height,
        clothes_id=clothes,
    )
    report.records.append(record)


def parse_market1501(source: SourceSettings) -> ParseReport:
    """Parse ``bounding_box_train``, ``query`` and ``bounding_box_test``.

    Junk (identity -1) is left out, as in every peer's evaluation; distractors (identity 0000) stay in the gallery and
    match nobody.

    Raises:
        DataError: a folder is missing or holds no image of the published name form; counts that differ from the
            published ones only warn if ``allow_count_mismatch``.
    """
    root = find_market_root(source.root)
    report = ParseReport(root)
    for folder, split in MARKET_FOLDERS.items():
        count = 0
        for path in tqdm(list(find_images(root / folder, report)), desc=f"{source.name} {folder}", unit="image"):
            match = MARKET_NAME.fullmatch(path.name)
            if not match:
                report.skip("name is not of the form 0002_c1s1_000451_03.jpg")
                continue
            count += 1
            if match["person"] == MARKET_JUNK:
                report.skip("junk (identity -1)")
                continue
            _add_record(report, source, path, split, match["person"], match["camera"], None)
        if count == 0:
            raise DataError(f"{root / folder} holds no file named like 0002_c1s1_000451_03.jpg.")
        if count != MARKET_COUNTS[folder]:
            message = f"{root / folder} holds {count} images, Market-1501 has {MARKET_COUNTS[folder]}."
            if not source.allow_count_mismatch:
                raise DataError(f"{message} Get the missing files, or set allow_count_mismatch: true.")
            report.warnings.append(message)
    report.records.sort(key=attrgetter("path"))
    return report


def find_market_root(root: Path) -> Path:
    """Return the folder that holds Market-1501's three folders: ``root`` or its ``Market-1501-v15.09.15``.

    Raises:
        DataError: the folder or one of the three is missing.
    """
    for candidate in (root, root / "Market-1501-v15.09.15"):
        if all((candidate / folder).is_dir() for folder in MARKET_FOLDERS):
            return candidate
    if not root.is_dir():
        raise DataError(f"Data set folder {root} does not exist.")
    missing = [folder for folder in MARKET_FOLDERS if not (root / folder).is_dir()]
    raise DataError(f"{root} lacks the folder(s) {', '.join(missing)} of Market-1501.")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern such as ``{person}/{camera}_{index}.png``.

    ``{person}`` is required; ``{camera}`` and ``{clothes}`` are optional; any other name matches and is ignored. A
    field takes the shortest text without a slash; everything else is literal.

    Raises:
        ConfigError: no ``{person}``, a field twice, or a brace that belongs to no field.
    """
    parts = re.split(r"\{([a-z_]+)\}", pattern)
    names = parts[1::2]
    if "person" not in names or len(set(names)) != len(names):
        raise ConfigError(f"Pattern {pattern!r} must name {{person}}, and each field once.")
    if any(brace in part for part in parts[::2] for brace in "{}"):
        raise ConfigError(f"Pattern {pattern!r}: field names are lower-case letters and _ in braces, e.g. {{camera}}.")
    pieces = [re.escape(part) if i % 2 == 0 else f"(?P<{part}>[^/]+?)" for i, part in enumerate(parts)]
    return re.compile("".join(pieces))


def assign_splits(records: list[ImageRecord], train_share: float, query_cameras: tuple[str, ...]) -> list[ImageRecord]:
    """Return the records with splits: the first ``train_share`` of the sorted identities trains, the rest is tested.

    Of the tested identities, images of ``query_cameras`` are queries and the others the gallery.
    """
    people = sorted({record.person_id for record in records})
    training = set(people[: round(len(people) * train_share)])

    def find_split(record: ImageRecord) -> Split:
        if record.person_id in training:
            return "train"
        return "query" if record.camera_id in query_cameras else "gallery"

    return [replace(record, split=find_split(record)) for record in records]


def parse_pattern(source: SourceSettings) -> ParseReport:
    """Parse any folder of crops by ``source.pattern``; identities are split by ``train_share``, so never shared.

    Without ``{camera}`` every image counts as a camera of its own, so that nothing is ignored in evaluation.

    Raises:
        ConfigError: the pattern is wrong.
        DataError: missing folder, or no file that matches.
    """
    if not source.root.is_dir():
        raise DataError(f"Data set folder {source.root} does not exist.")
    expression = compile_pattern(source.pattern or "")
    report = ParseReport(source.root)
    example = ""
    for path in tqdm(list(find_images(source.root, report)), desc=source.name, unit="image"):
        relative = path.relative_to(source.root).as_posix()
        match = expression.fullmatch(relative)
        if not match:
            example = example or relative
            report.skip("path does not match the pattern")
            continue
        fields = match.groupdict()
        camera = fields.get("camera", relative)
        _add_record(report, source, path, "train", fields["person"], camera, fields.get("clothes"))
    if not report.records:
        hint = f" For example {example!r} does not match." if example else " It holds no image files."
        raise DataError(f"No file below {source.root} matches the pattern {source.pattern!r}.{hint}")
    report.records = assign_splits(report.records, source.train_share, source.query_cameras)
    report.records.sort(key=attrgetter("path"))
    report.warnings += _find_split_warnings(report.records, source.query_cameras)
    return report


def _find_split_warnings(records: list[ImageRecord], query_cameras: tuple[str, ...]) -> list[str]:
    splits = {record.split for record in records}
    cameras = {record.camera_id for record in records}
    found = ", ".join(sorted(cameras)[:10])
    warnings: list[str] = []
    unknown = [camera for camera in query_cameras if camera not in cameras]
    if unknown:
        warnings.append(f"query_cameras names {', '.join(unknown)}, which no image has (cameras found: {found})")
    if splits - {"train"} and not {"query", "gallery"} <= splits:
        missing = "query" if "query" not in splits else "gallery"
        warnings.append(f"no {missing} images: set query_cameras (cameras found: {found}) to evaluate")
    return warnings


def parse_source(source: SourceSettings) -> ParseReport:
    """Parse one source with its parser and attach its captions and attributes.

    Raises:
        ConfigError: the pattern is wrong.
        DataError: see the parsers and ``attach_annotations``.
    """
    parse = parse_market1501 if source.parser == "market1501" else parse_pattern
    report = parse(source)
    if source.captions is not None:
        report.records = attach_annotations(report.records, source.captions)
    return report

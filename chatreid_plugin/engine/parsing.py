"""One raw data set becomes ImageRecords: its parser's listing, the published counts, what the pixels say, captions."""

from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..config import SourceSettings
from ..datasets.listing import Crop
from ..datasets.registry import list_source
from ..errors import DataError
from ..records import ImageRecord
from ..shards import read_manifest
from .annotations import attach_annotations
from .inspection import ImageFacts, inspect_images


@dataclass(slots=True)
class ParseReport:
    """What was read and what was left out, with reasons.

    Attributes:
        root: the folder that the records' paths are relative to.
        records: the ImageRecords, sorted by path.
        skipped: reason -> number of files left out.
        warnings: things that are allowed but unusual.
        protocol: see ``Listing``.
    """

    root: Path
    records: list[ImageRecord] = field(default_factory=list[ImageRecord])
    skipped: dict[str, int] = field(default_factory=dict[str, int])
    warnings: list[str] = field(default_factory=list[str])
    protocol: dict[str, Any] = field(default_factory=dict[str, Any])


def _make_record(source: SourceSettings, crop: Crop, facts: ImageFacts) -> ImageRecord:
    return ImageRecord(
        image_id=f"{source.name}/{crop.path}",
        dataset=source.name,
        split=crop.split,
        path=crop.path,
        person_id=f"{source.name}:{crop.person}",
        camera_id=crop.camera,
        width=facts.width,
        height=facts.height,
        clothes_id=crop.clothes,
        modality=crop.modality,
        captions=crop.captions,
        attributes=crop.attributes,
        content_hash=facts.content_hash,
        perceptual_hash=facts.perceptual_hash,
        sharpness=facts.sharpness,
        brightness=facts.brightness,
    )


def find_known_facts(root: Path, manifest: Path) -> dict[str, ImageFacts]:
    """Return path -> facts of the images that an earlier manifest describes and that have not changed since.

    New captions then cost no decoding. A file is unchanged if it is older than the manifest, and so is its inode: a
    copy may bring an older date along, but nothing dates the inode back.
    """
    try:
        records, known_root = read_manifest(manifest)
    except DataError:
        return {}
    if known_root != root.resolve():
        return {}
    since = manifest.stat().st_mtime
    facts: dict[str, ImageFacts] = {}
    for record in records:
        path = root / record.path
        if record.content_hash and path.is_file() and max(path.stat().st_mtime, path.stat().st_ctime) < since:
            values = [getattr(record, field.name) for field in fields(ImageFacts)]
            facts[record.path] = ImageFacts(*values)
    return facts


def parse_source(source: SourceSettings, workers: int = 1, manifest: Path | None = None) -> ParseReport:
    """Parse one source with its parser, look at every image, and attach its captions and attributes.

    Args:
        source: which data set, where, and how.
        workers: processes that decode images; the result does not depend on it.
        manifest: an earlier manifest of the source, whose images need not be decoded again.

    Raises:
        ConfigError: see ``list_source``.
        DataError: see ``list_source`` and ``attach_annotations``; or an image cannot be decoded and
            ``source.unreadable`` is not ``skip``.
    """
    listing = list_source(source)
    crops = sorted(listing.crops, key=attrgetter("path"))
    known = find_known_facts(listing.root, manifest) if manifest else {}
    found = inspect_images(listing.root, [crop.path for crop in crops], source.name, workers, known)
    report = ParseReport(listing.root, [], listing.skipped, listing.warnings, listing.protocol)
    damaged = [facts for facts in found if isinstance(facts, str)]
    if damaged and source.unreadable == "raise":
        raise DataError(
            f"Source {source.name}: {len(damaged)} image(s) cannot be read. First: {damaged[0]} "
            "Or set unreadable: skip to leave them out."
        )
    if damaged:
        report.skipped["cannot be decoded"] = len(damaged)
        report.warnings += damaged[:10]
    report.records = [
        _make_record(source, crop, facts)
        for crop, facts in zip(crops, found, strict=True)
        if isinstance(facts, ImageFacts)
    ]
    if source.captions is not None:
        report.records, occluded = attach_annotations(report.records, source.captions)
        if occluded:
            report.warnings.append(
                f"{occluded} training images are occluded (clothing not recognised); Stage 1 leaves them out"
            )
    return report

"""One raw data set becomes ImageRecords: its parser's listing, the published counts, what the pixels say, captions."""

from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..config import SourceSettings
from ..errors import ConfigError, DataError
from ..records import ImageRecord
from ..shards import read_manifest
from .annotations import attach_annotations
from .catalog import check_counts, refuse_withdrawn
from .inspection import ImageFacts, inspect_images
from .listing import Crop, Listing
from .parsers import PARSERS
from .places import check_places


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


_OWN = ("pattern", "list")
# Settings that only some parsers read; elsewhere they would be passed over in silence.
_READERS = {
    "pattern": ("pattern",),
    "labels": ("list", "cuhkpedes", "icfgpedes", "rstpreid", "ufine6926"),
    "query_cameras": _OWN,
    "queries_per_person": _OWN,
}


def _refuse_keys_of_others(source: SourceSettings) -> None:
    for key, readers in _READERS.items():
        if getattr(source, key) and source.parser_name not in readers:
            raise ConfigError(
                f"Source {source.name}: `{key}` belongs to the parsers {', '.join(readers)}; this source's parser is "
                f"{source.parser_name}. Remove the key, or set `parser`."
            )


def list_source(source: SourceSettings) -> Listing:
    """Return the crops of a source without opening any image; published counts are checked.

    Raises:
        ConfigError: an unknown parser or variant, a key of another parser, or a data set that was withdrawn.
        DataError: see the parsers and ``check_places``; or counts differ from the published ones and
            ``allow_count_mismatch`` is off.
    """
    refuse_withdrawn(source)
    if source.parser_name not in PARSERS:
        raise ConfigError(
            f"Source {source.name}: unknown parser {source.parser_name!r}. Known: {', '.join(sorted(PARSERS))}."
        )
    _refuse_keys_of_others(source)
    listing = PARSERS[source.parser_name](source)
    check_places(listing)
    listing.warnings += check_counts(source, listing.crops)
    return listing


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

"""Sources become manifests, tables of ImageRecords; the training images of all come back under one image root.

A record has its parser's labels, what the pixels say (``image_facts``), and captions.
"""

import os
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import xxhash

from .. import __version__
from ..config import BuildSettings, SourceSettings
from ..errors import DataError
from ..locks import share_folder
from ..printing import say
from ..records import ImageRecord
from ..shards import (
    DIGEST,
    make_manifest_table,
    pc,
    read_manifest,
    read_manifest_provenance,
    read_manifest_table,
    write_manifest,
)
from .annotations import attach_annotations
from .screening.audit import drop_leaks


if TYPE_CHECKING:
    from ..datasets.listing import Crop
    from .image_facts import ImageFacts


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


def _make_record(source: SourceSettings, crop: "Crop", facts: "ImageFacts") -> ImageRecord:
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


def find_known_facts(root: Path, manifest: Path) -> "dict[str, ImageFacts]":
    """Return path -> facts of the images that an earlier manifest describes and that have not changed since.

    New captions then cost no decoding. A file is unchanged if it is older than the manifest, and so is its inode: a
    copy may bring an older date along, but nothing dates the inode back.
    """
    from .image_facts import ImageFacts

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
    # SciPy and more, half a second that a build from manifests need not wait.
    from ..datasets.registry import list_source
    from .image_facts import ImageFacts, inspect_images

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


def describe_parse(name: str, report: ParseReport) -> str:
    """Return one line per split and reason for the user."""
    lines: list[str] = []
    for split in ("train", "val", "query", "gallery"):
        records = [record for record in report.records if record.split == split]
        if not records:
            continue
        people = len({record.person_id for record in records})
        cameras = len({record.camera_id for record in records})
        lines.append(f"{name} {split}: {len(records)} images, {people} identities, {cameras} cameras")
    lines += [f"{name} left out: {count} ({reason})" for reason, count in sorted(report.skipped.items())]
    lines += [f"{name} warning: {warning}" for warning in report.warnings]
    return "\n".join(lines)


def find_manifest(settings: BuildSettings, name: str) -> Path:
    """Return where the manifest of a source is kept."""
    return settings.manifest_dir / f"{name}.parquet"


def describe_origin(source: SourceSettings) -> dict[str, Any]:
    """Return what a manifest depends on: the source's settings and the bytes of its captions file."""
    captions = source.captions
    digest = xxhash.xxh3_128_hexdigest(captions.read_bytes()) if captions is not None and captions.is_file() else None
    labels = source.model_dump(mode="json", exclude={"stages", "weight", "change"})  # these choose among the records
    return {"source": labels, "captions_digest": digest}


def is_current(path: Path, source: SourceSettings) -> bool:
    """Return whether a manifest exists and was made from these settings and this captions file."""
    if not path.is_file():
        return False
    try:
        provenance = read_manifest_provenance(path)
    except DataError:
        # A run killed between the two files leaves a manifest without provenance, or with that of another.
        return False
    # Earlier versions noted no digest, and a killed run may have left two files that do not belong together.
    return DIGEST in provenance and all(provenance.get(key) == value for key, value in describe_origin(source).items())


def _parse(source: SourceSettings, settings: BuildSettings, recheck: bool = False) -> ParseReport:
    earlier = None if recheck else find_manifest(settings, source.name)
    report = parse_source(source, settings.count_workers(), earlier)
    say(describe_parse(source.name, report), aside=True)
    return report


def _write(path: Path, source: SourceSettings, report: ParseReport) -> None:
    provenance = {
        **describe_origin(source),
        "version": __version__,
        "skipped": report.skipped,
        "warnings": report.warnings,
        "protocol": report.protocol,
    }
    with share_folder(path.parent):
        write_manifest(path, report.records, report.root, provenance)


def parse_sources(settings: BuildSettings, recheck: bool = False) -> list[Path]:
    """Parse every source into a manifest (Parquet of ImageRecords, provenance beside it) and say what was found.

    Args:
        settings: the recipe.
        recheck: decode every image again, those too that have not changed since an earlier manifest.

    Raises:
        DataError: a folder, file or caption line is missing or wrong.
    """
    paths: list[Path] = []
    for source in settings.sources:
        path = find_manifest(settings, source.name)
        _write(path, source, _parse(source, settings, recheck))
        paths.append(path)
    return paths


def _read_source(settings: BuildSettings, source: SourceSettings, *, write: bool) -> tuple[pa.Table, Path]:
    """Return all images of a source; one whose manifest is missing, or was made from other settings, is parsed."""
    path = find_manifest(settings, source.name)
    if is_current(path, source):
        return read_manifest_table(path)
    report = _parse(source, settings)
    if write:
        _write(path, source, report)
    return make_manifest_table(report.records), report.root.resolve()


class TrainingImages(NamedTuple):
    """What a recipe trains on.

    Attributes:
        tables: of ``IMAGE_RECORD_SCHEMA``, one for each source that trains a stage.
        root: the folder that all sources share; the paths of the tables are relative to it.
        folders: source -> its own folder below the root, which the paths of its manifest are relative to.
    """

    tables: list[pa.Table]
    root: Path
    folders: dict[str, Path]


def read_training_images(settings: BuildSettings, *, write: bool) -> TrainingImages:
    """Return the training images of each source, with paths relative to the folder that all sources share.

    What leaks from a test set is left out or refused (``drop_leaks``); ``quality`` comes later, stage by stage.

    Args:
        settings: the recipe.
        write: keep what was parsed as a manifest; nothing is written otherwise.

    Raises:
        DataError: a source cannot be parsed, has no training images, or leaks test images.
    """
    tables: list[pa.Table] = []
    found: list[pa.Table] = []
    roots: dict[str, Path] = {}
    for source in settings.sources:
        table, root = _read_source(settings, source, write=write)
        tables.append(table)
        if not source.stages:
            continue
        training = _select_training(table)
        if not training.num_rows:
            raise DataError(
                f"Source {source.name} has no training images. Raise its train_share, or set stages: [] if it is only "
                "tested."
            )
        found.append(training)
        roots[source.name] = root
    if not found:
        raise DataError("No source trains a stage: `stages` is empty everywhere.")
    common = Path(os.path.commonpath(roots.values()))
    folders = {name: root.relative_to(common) for name, root in roots.items()}
    selected = drop_leaks(found, tables, settings)
    moved = [_move_paths(table, folder) for table, folder in zip(selected, folders.values(), strict=True)]
    return TrainingImages(moved, common, folders)


def _select_training(table: pa.Table) -> pa.Table:
    chosen = pc.equal(table["split"], "train")
    # Filtering a hundred thousand rows of nested columns takes half a second; often there is nothing to leave out.
    return table if pc.all(chosen).as_py() else table.filter(chosen)


def _move_paths(table: pa.Table, folder: Path) -> pa.Table:
    if folder == Path():
        return table
    paths = pc.binary_join_element_wise(folder.as_posix(), table["path"], "/")
    return table.set_column(table.schema.get_field_index("path"), "path", paths)

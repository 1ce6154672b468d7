"""Sources become manifests, tables of ImageRecords; the training images of all come back under one image root.

A record has its parser's labels, what the pixels say (``image_facts``), and the captions and attributes of a file.
From the manifest on an image is a row of a table.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

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
    read_json_lines,
    read_manifest_provenance,
    read_manifest_table,
    select_splits,
    write_manifest,
)


if TYPE_CHECKING:
    from ..datasets.listing import Crop
    from .image_facts import ImageFacts


TESTED_SPLITS = ("query", "gallery")
# Of a line of a captions file. The last two are what `chatreid caption` writes: whether the clothing was seen, and who
# was asked.
KEYS = ("path", "person", "captions", "attributes", "clothing_recognised", "model")


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
        clothes_id=crop.clothes,
        modality=crop.modality,
        captions=crop.captions,
        attributes=crop.attributes,
        **asdict(facts),
    )


def find_known_facts(root: Path, manifest: Path) -> "dict[str, ImageFacts]":
    """Return path -> facts of the images that an earlier manifest describes and that have not changed since.

    New captions then cost no decoding. A file is unchanged if it is older than the manifest, and so is its inode: a
    copy may bring an older date along, but nothing dates the inode back.
    """
    from .image_facts import ImageFacts

    try:
        table, known_root = read_manifest_table(manifest)
    except DataError:
        return {}
    if known_root != root.resolve():
        return {}
    since = manifest.stat().st_mtime
    facts: dict[str, ImageFacts] = {}
    for row in table.select(["path", *ImageFacts.__dataclass_fields__]).to_pylist():
        path = row.pop("path")
        file, known = root / path, ImageFacts(**row)
        if known.content_hash and file.is_file() and max(file.stat().st_mtime, file.stat().st_ctime) < since:
            facts[path] = known
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


# ---- Captions and attributes of a JSON Lines file ----


def attach_annotations(records: list[ImageRecord], path: Path) -> tuple[list[ImageRecord], int]:
    """Return the records with captions and attributes from a JSON Lines file, and how many are occluded.

    An occluded training image, whose clothing was not recognised, has neither: Stage 1 leaves it out, as the paper
    does (section 3.2). Stages 2 and 3 ask who it is; infrared images show no clothing at all to many a model.

    A line is ``{"path": ..., "captions": [...], "attributes": {...}}``, where ``path`` is an image's path below the
    data set folder, or ``{"person": ...}`` with the identity as published, for all of a person's images. What an
    image's own line says replaces what its person's line says.

    Raises:
        DataError: a line is wrong, has an unknown key, names an image or person that the data set does not have, or
            one named before.
    """
    known = {
        "path": {record.path for record in records},
        "person": {_get_person(record) for record in records},
    }
    found: dict[str, dict[str, Mapping[str, Any]]] = {"path": {}, "person": {}}
    for number, line in read_json_lines(path):
        where = f"{path}, line {number}"
        _check_keys(line, where)
        key = "path" if "path" in line else "person"
        value = _read_name(line.get(key))
        if value not in known[key]:
            near = get_close_matches(value, known[key], 1, 0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{where}: the data set has no {key} {line.get(key)!r}.{hint}")
        if value in found[key]:
            raise DataError(f"{where}: {key} {value!r} was described before; write one line for it.")
        _check_line(line, where)
        found[key][value] = line

    described: list[ImageRecord] = []
    occluded = 0
    for record in records:
        line = {**found["person"].get(_get_person(record), {}), **found["path"].get(record.path, {})}
        if record.split == "train" and line.get("clothing_recognised") is False:
            line = {"captions": (), "attributes": {}}
            occluded += 1
        captions = tuple(line.get("captions", record.captions))
        described.append(replace(record, captions=captions, attributes=line.get("attributes", record.attributes)))
    return described, occluded


def _get_person(record: ImageRecord) -> str:
    return record.person_id.partition(":")[2]


def _read_name(value: object) -> str:
    """Return a path or identity; a number stands for its digits."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, str | int | None) and not isinstance(value, bool) else ""


def _check_keys(line: Mapping[str, Any], where: str) -> None:
    for key in line:
        if key not in KEYS:
            near = get_close_matches(key.lower(), KEYS, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise DataError(f"{where}: unknown key {key!r}.{hint} Keys are {', '.join(KEYS)}.")
    if ("path" in line) == ("person" in line):
        raise DataError(f"{where}: a line describes one image or one person: it needs either `path` or `person`.")


def _check_line(line: Mapping[str, Any], where: str) -> None:
    captions, attributes = line.get("captions", []), line.get("attributes", {})
    if not isinstance(captions, list) or not all(_is_text(caption) for caption in cast(list[Any], captions)):
        raise DataError(f"{where}: captions must be a list of texts that are not empty.")
    if not isinstance(attributes, dict) or not all(
        _is_text(value) for value in cast(dict[str, Any], attributes).values()
    ):
        raise DataError(f"{where}: attributes must be an object whose values are texts that are not empty.")
    if not isinstance(line.get("clothing_recognised", True), bool):
        raise DataError(f"{where}: clothing_recognised must be true or false.")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


# ---- Manifests ----


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


def list_tested(tables: Iterable[pa.Table], settings: BuildSettings) -> pa.Table:
    """Return the query and gallery images of the sources' tables and of the manifests of ``audit_against``.

    Raises:
        DataError: a manifest is missing, unreadable, or has no such images.
    """
    tested = [select_splits(table, *TESTED_SPLITS) for table in tables]
    for path in settings.audit_against:
        tested.append(select_splits(read_manifest_table(path)[0], *TESTED_SPLITS))
        if not tested[-1].num_rows:
            raise DataError(f"{path} of audit_against holds no query or gallery images. Leave it out.")
    return pa.concat_tables(tested)


def read_training_images(settings: BuildSettings, *, write: bool) -> TrainingImages:
    """Return the training images of each source, with paths relative to the folder that all sources share.

    What leaks from a test set is left out or refused (``apply_leak_rule``); ``quality`` comes later, stage by stage.

    Args:
        settings: the recipe.
        write: keep what was parsed as a manifest; nothing is written otherwise.

    Raises:
        DataError: a source cannot be parsed, has no training images, or leaks test images.
    """
    read = {source.name: _read_source(settings, source, write=write) for source in settings.sources}
    training = {
        source.name: select_splits(read[source.name][0], "train") for source in settings.sources if source.stages
    }
    for name, table in training.items():
        if not table.num_rows:
            raise DataError(
                f"Source {name} has no training images. Raise its train_share, or set stages: [] if it is only tested."
            )
    if not training:
        raise DataError("No source trains a stage: `stages` is empty everywhere.")
    selected = list(training.values())
    tested = list_tested([table for table, _ in read.values()], settings)
    if tested.num_rows:
        # pandas takes half a second, which a build without a test set need not wait.
        from .screening.audit import apply_leak_rule

        selected = apply_leak_rule(selected, tested, settings)
    common = Path(os.path.commonpath([read[name][1] for name in training]))
    folders = {name: read[name][1].relative_to(common) for name in training}
    moved = [_move_paths(table, folder) for table, folder in zip(selected, folders.values(), strict=True)]
    return TrainingImages(moved, common, folders)


def _move_paths(table: pa.Table, folder: Path) -> pa.Table:
    if folder == Path():
        return table
    paths = pc.binary_join_element_wise(folder.as_posix(), table["path"], "/")
    return table.set_column(table.schema.get_field_index("path"), "path", paths)

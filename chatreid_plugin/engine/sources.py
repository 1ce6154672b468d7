"""Sources become manifests; the training images of all manifests come back under one image root."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from .. import __version__
from ..config import BuildSettings, SourceSettings
from ..errors import DataError
from ..records import ImageRecord
from ..shards import read_manifest, read_manifest_provenance, write_manifest
from .parsers import ParseReport, parse_source


def describe_parse(name: str, report: ParseReport) -> str:
    """Return one line per split and reason for the user."""
    lines: list[str] = []
    for split in ("train", "query", "gallery"):
        records = [record for record in report.records if record.split == split]
        people = len({record.person_id for record in records})
        cameras = len({record.camera_id for record in records})
        lines.append(f"{name} {split}: {len(records)} images, {people} identities, {cameras} cameras")
    lines += [f"{name} left out: {count} ({reason})" for reason, count in sorted(report.skipped.items())]
    lines += [f"{name} warning: {warning}" for warning in report.warnings]
    return "\n".join(lines)


def find_manifest(settings: BuildSettings, name: str) -> Path:
    """Return where the manifest of a source is kept."""
    return settings.manifest_dir / f"{name}.parquet"


def _describe_origin(source: SourceSettings) -> dict[str, Any]:
    """Return what a manifest depends on: the source's settings and the bytes of its captions file."""
    captions = source.captions
    digest = xxhash.xxh3_128_hexdigest(captions.read_bytes()) if captions is not None and captions.is_file() else None
    return {"source": source.model_dump(mode="json"), "captions_digest": digest}


def is_current(path: Path, source: SourceSettings) -> bool:
    """Return whether a manifest exists and was made from these settings and this captions file."""
    if not path.is_file():
        return False
    try:
        provenance = read_manifest_provenance(path)
    except DataError:
        # A run killed between the two files leaves a manifest without provenance.
        return False
    return all(provenance.get(key) == value for key, value in _describe_origin(source).items())


def _parse(source: SourceSettings) -> ParseReport:
    report = parse_source(source)
    print(describe_parse(source.name, report), file=sys.stderr)
    return report


def _write(path: Path, source: SourceSettings, report: ParseReport) -> None:
    provenance = {
        **_describe_origin(source),
        "version": __version__,
        "skipped": report.skipped,
        "warnings": report.warnings,
    }
    write_manifest(path, report.records, report.root, provenance)


def parse_sources(settings: BuildSettings) -> list[Path]:
    """Parse every source into a manifest (Parquet of ImageRecords, provenance beside it) and say what was found.

    Raises:
        DataError: a folder, file or caption line is missing or wrong.
    """
    paths: list[Path] = []
    for source in settings.sources:
        path = find_manifest(settings, source.name)
        _write(path, source, _parse(source))
        paths.append(path)
    return paths


def read_training_records(settings: BuildSettings, *, write: bool) -> tuple[list[list[ImageRecord]], Path]:
    """Return the training images of each source, with paths relative to the folder that all sources share.

    A source whose manifest is missing, or was made from other settings, is parsed again.

    Args:
        settings: the recipe.
        write: keep what was parsed as a manifest; nothing is written otherwise.

    Raises:
        DataError: a source cannot be parsed or has no training images.
    """
    found: list[tuple[list[ImageRecord], Path]] = []
    for source in settings.sources:
        path = find_manifest(settings, source.name)
        if is_current(path, source):
            records, root = read_manifest(path)
        else:
            report = _parse(source)
            records, root = report.records, report.root.resolve()
            if write:
                _write(path, source, report)
        training = [record for record in records if record.split == "train"]
        if not training:
            raise DataError(f"Source {source.name} has no training images; raise its train_share.")
        found.append((training, root))
    common = Path(os.path.commonpath([root for _, root in found]))
    moved = [
        [replace(r, path=(root.relative_to(common) / r.path).as_posix()) for r in records] for records, root in found
    ]
    return moved, common

"""A manifest as a protocol finds it: records by split, and what the data set's own files say about its evaluation."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...errors import DataError
from ...eval_settings import EvalSettings
from ...records import ImageRecord
from ...shards import read_manifest, read_manifest_provenance
from .fitting import check_dataset, check_labels, get_variant


logger = logging.getLogger(__name__)

Item = TypeVar("Item")

EXAMPLES_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Source:
    """What a manifest holds for an evaluation.

    Attributes:
        path: the manifest.
        queries: records of split ``query``.
        gallery: records of split ``gallery``.
        image_root: folder that the records' paths are relative to.
        variant: form of the data set, e.g. ``v2``; empty if it has one only.
        notes: what the parser found for the evaluation (published trials, people that change clothes).
    """

    path: Path
    queries: list[ImageRecord]
    gallery: list[ImageRecord]
    image_root: Path
    variant: str
    notes: Mapping[str, Any]

    def need(self, key: str, advice: str) -> Any:
        """Return a note of the parser.

        Raises:
            DataError: the manifest has none.
        """
        if key not in self.notes:
            raise DataError(f"{self.path} says nothing of {key}. {advice}")
        return self.notes[key]


def read_source(settings: EvalSettings, *, queries_needed: bool = True) -> Source:
    """Read the manifest of an evaluation.

    Raises:
        DataError: it is missing or damaged, is of another data set or lacks its labels, or has no gallery, or no
            queries where they are images of their own.
    """
    records, manifest_root = read_manifest(settings.manifest)
    provenance = read_manifest_provenance(settings.manifest)
    check_dataset(settings, provenance, records)
    queries = [record for record in records if record.split == "query"]
    gallery = [record for record in records if record.split == "gallery"]
    notes = provenance.get("protocol") or {}
    if queries_needed and notes.get("query_is_gallery"):
        raise DataError(f"{settings.manifest} is of CUHK03's classic protocol: use protocol: cuhk03_classic.")
    if not gallery or (queries_needed and not queries):
        raise DataError(
            f"{settings.manifest} has {len(queries)} queries and {len(gallery)} gallery images; an evaluation needs "
            "both. Choose a manifest whose parser makes the splits query and gallery."
        )
    check_labels(settings, queries, gallery)
    root = (settings.image_root or manifest_root).resolve()
    return Source(settings.manifest, queries, gallery, root, get_variant(provenance), notes)


def take_evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return at most ``limit`` items, evenly spaced and in order; always the same ones."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[place * len(items) // limit] for place in range(limit)]


def check_images(records: Iterable[ImageRecord], image_root: Path, *, required: bool = True) -> None:
    """Refuse to begin while image files are missing; where they are not required, warn.

    Raises:
        DataError: names the first missing ones.
    """
    missing = sorted({record.path for record in records if not (image_root / record.path).is_file()})
    if missing:
        shown = "".join(f"\n  {path}" for path in missing[:EXAMPLES_SHOWN])
        text = (
            f"{len(missing)} image file(s) of the manifest are not under {image_root}:{shown}\n"
            "Set image_root to the folder that the paths are relative to."
        )
        if required:
            raise DataError(text)
        logger.warning("%s\nNo image is looked at: only the pictures of the report will be missing.", text)

"""What is searched for, in what, what is ignored: a manifest and its rules become a ``Protocol``, checked up front.

First step of an evaluation. A query that can match nothing is found here, with the reason, before a model is loaded.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError
from ..eval_settings import EvalSettings
from ..records import ImageRecord
from ..shards import read_manifest
from .metrics import Cmc
from .queries import Query, make_image_query
from .ties import AveragePrecision, IntArray


BoolArray = npt.NDArray[np.bool_]

logger = logging.getLogger(__name__)

EXAMPLES_SHOWN = 10


@dataclass(frozen=True, slots=True)
class SkippedQuery:
    """A query that no gallery image can match, and why."""

    image_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Protocol:
    """One benchmark, ready to be measured.

    Attributes:
        name: as in the YAML.
        variant: the rules in words, for the report.
        queries: every query that has a match.
        gallery: everything that is ranked, in the manifest's order.
        image_root: folder that the records' paths are relative to.
        same_camera_ignored: remove gallery images of the query's own identity and camera before ranking.
        average_precision: definition, as in ``evaluate_ranking``.
        cmc: definition, as in ``evaluate_ranking``.
        skipped: queries left out because nothing can match them.
    """

    name: str
    variant: str
    queries: list[Query]
    gallery: list[ImageRecord]
    image_root: Path
    same_camera_ignored: bool = True
    average_precision: AveragePrecision = "mean"
    cmc: Cmc = "standard"
    skipped: tuple[SkippedQuery, ...] = ()


@dataclass(frozen=True, slots=True)
class Labels:
    """Identities and cameras of a protocol as integer codes: (Q,) for the queries, (G,) for the gallery."""

    query_person: IntArray
    gallery_person: IntArray
    query_camera: IntArray
    gallery_camera: IntArray
    same_camera_ignored: bool

    def find_ignored(self, query: int) -> BoolArray:
        """Return the mask (G,) of what is removed from the query's ranking: its own identity in its own camera."""
        if not self.same_camera_ignored:
            return np.zeros(len(self.gallery_person), dtype=np.bool_)
        same_person = self.gallery_person == self.query_person[query]
        return same_person & (self.gallery_camera == self.query_camera[query])

    def find_positives(self, query: int) -> BoolArray:
        """Return the mask (G,) of the query's matches."""
        return (self.gallery_person == self.query_person[query]) & ~self.find_ignored(query)


def label_protocol(protocol: Protocol) -> Labels:
    """Return the protocol's identities and cameras as integer codes, fast to compare."""
    records: list[Query | ImageRecord] = [*protocol.queries, *protocol.gallery]
    persons = np.unique([record.person_id for record in records], return_inverse=True)[1]
    cameras = np.unique([record.camera_id for record in records], return_inverse=True)[1]
    count = len(protocol.queries)
    return Labels(persons[:count], persons[count:], cameras[:count], cameras[count:], protocol.same_camera_ignored)


def _is_distractor(record: ImageRecord) -> bool:
    """Market-1501 publishes distractors as identity 0; they are nobody's match."""
    return record.person_id.rpartition(":")[2].strip("0") == ""


def _find_cameras(gallery: Iterable[ImageRecord], *, distractors: bool) -> dict[str, set[str]]:
    """Return identity -> cameras that saw it in the gallery, Market-1501's distractors left out if asked."""
    cameras: dict[str, set[str]] = {}
    for record in gallery:
        if not (distractors and _is_distractor(record)):
            cameras.setdefault(record.person_id, set()).add(record.camera_id)
    return cameras


def _explain_no_match(query: ImageRecord, cameras: Mapping[str, set[str]], camera_rule: bool) -> str | None:
    """Return why nothing in the gallery can match the query, or None if something can."""
    seen_by = cameras.get(query.person_id)
    if not seen_by:
        return f"identity {query.person_id} is absent from the gallery"
    if camera_rule and seen_by == {query.camera_id}:
        return f"identity {query.person_id} is only seen by the query's own camera {query.camera_id}"
    return None


def _report_skipped(skipped: Sequence[SkippedQuery], total: int, camera_rule: bool, manifest: Path) -> None:
    """Warn of queries without a match; refuse if none is left."""
    if not skipped:
        return
    lines = [f"  {item.image_id}: {item.reason}" for item in skipped[:EXAMPLES_SHOWN]]
    if len(skipped) > EXAMPLES_SHOWN:
        lines.append(f"  ... and {len(skipped) - EXAMPLES_SHOWN} more")
    text = f"{len(skipped)} of {total} queries in {manifest} have no match in the gallery:\n" + "\n".join(lines)
    if len(skipped) < total:
        logger.warning("%s\nThey are skipped and are in no average.", text)
        return
    advice = "Check that query and gallery share identities"
    if camera_rule:
        advice += "; if the cameras are unknown or all the same, set protocol=folder camera_rule=false"
    raise DataError(f"{text}\nNo query is left to evaluate. {advice}.")


def take_evenly(records: Sequence[ImageRecord], limit: int | None) -> list[ImageRecord]:
    """Return at most ``limit`` records, evenly spaced and in order; always the same ones."""
    if limit is None or limit >= len(records):
        return list(records)
    return [records[place * len(records) // limit] for place in range(limit)]


def _check_images(records: Iterable[ImageRecord], image_root: Path) -> None:
    missing = sorted({record.path for record in records if not (image_root / record.path).is_file()})
    if missing:
        shown = "".join(f"\n  {path}" for path in missing[:EXAMPLES_SHOWN])
        raise DataError(
            f"{len(missing)} image file(s) of the manifest are not under {image_root}:{shown}\n"
            "Set image_root to the folder that the paths are relative to."
        )


def load_protocol(settings: EvalSettings) -> Protocol:
    """Read the manifest and return its protocol, with the queries that can match something.

    ``market1501``: queries = split query, gallery = split gallery with the distractors (identity 0) and without the
    junk (-1), which the parser removed; ignored per query: same identity and same camera (Zheng et al., 2015).
    ``folder``: the same, and ``camera_rule: false`` ignores nothing. ``max_queries`` takes an evenly spaced subset.

    Raises:
        ConfigError: ``camera_rule: false`` with a published protocol.
        DataError: no queries, no gallery, image files missing, or no query with a match.
    """
    published = settings.protocol == "market1501"
    if published and not settings.camera_rule:
        raise ConfigError(
            "camera_rule: false is not the Market-1501 protocol, and its numbers could not be compared with others. "
            "Use protocol: folder to evaluate without the camera rule."
        )
    records, manifest_root = read_manifest(settings.manifest)
    image_root = (settings.image_root or manifest_root).resolve()
    queries = [record for record in records if record.split == "query"]
    gallery = [record for record in records if record.split == "gallery"]
    if not queries or not gallery:
        raise DataError(
            f"{settings.manifest} has {len(queries)} queries and {len(gallery)} gallery images; an evaluation needs "
            "both. Choose a manifest whose parser makes the splits query and gallery."
        )
    cameras = _find_cameras(gallery, distractors=published)
    reasons = [_explain_no_match(query, cameras, settings.camera_rule) for query in queries]
    skipped = tuple(
        SkippedQuery(query.image_id, reason) for query, reason in zip(queries, reasons, strict=True) if reason
    )
    _report_skipped(skipped, len(queries), settings.camera_rule, settings.manifest)
    kept = [query for query, reason in zip(queries, reasons, strict=True) if not reason]
    kept = take_evenly(kept, settings.max_queries)
    _check_images([*kept, *gallery], image_root)
    rule = "same identity and same camera ignored" if settings.camera_rule else "nothing ignored"
    return Protocol(
        name=settings.protocol,
        variant=f"single query, {rule}",
        queries=[make_image_query(record) for record in kept],
        gallery=gallery,
        image_root=image_root,
        same_camera_ignored=settings.camera_rule,
        skipped=skipped,
    )

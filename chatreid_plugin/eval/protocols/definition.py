"""What a benchmark is, once a protocol has read it: queries, gallery, trials, what is ignored, how it is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...records import ImageRecord
from ..arrays import BoolArray, IntArray
from ..identity_cmc import Cmc, Ties
from ..queries import Query
from ..ties import AveragePrecision
from .copies import find_copies


# What is removed from a query's ranking before it is measured, always of the query's own identity but for same_room:
# same_camera (Zheng et al., Market-1501, 2015); cloth_changing and same_clothes (Simple-CCReID, tools/eval_metrics.py,
# modes CC and SC); same_room (SYSU-MM01: its cameras 2 and 3 stand in one room, so the gallery of camera 2 is removed
# for queries of camera 3, whoever it shows); same_image (attribute sets, where images and not people match).
Rule = Literal["nothing", "same_camera", "cloth_changing", "same_clothes", "same_room", "same_image"]

RULES: Mapping[Rule, str] = {
    "nothing": "nothing ignored",
    "same_camera": "same identity and same camera ignored",
    "cloth_changing": "same identity with same camera or same clothes ignored",
    "same_clothes": "same identity with same camera or other clothes ignored",
    "same_room": "for camera 3 the gallery of camera 2 ignored",
    "same_image": "the query's own image ignored",
}
REASONS: Mapping[Rule, str] = {
    "nothing": "",
    "same_camera": "is only seen by the query's own camera {camera}",
    "cloth_changing": "is only seen by the query's own camera {camera} or in the query's clothes",
    "same_clothes": "is only seen by the query's own camera {camera} or in other clothes",
    "same_room": "is only seen in the query's own room (camera {camera})",
    "same_image": "is only in the query's own image",
}
SYSU_QUERY_CAMERA, SYSU_GALLERY_CAMERA = "3", "2"


@dataclass(frozen=True, slots=True)
class SkippedQuery:
    """A query that no gallery image can match, and why."""

    query_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Protocol:
    """One benchmark, ready to be measured.

    Attributes:
        name: as in the YAML.
        variant: the rules in words, for the report.
        queries: every query that has a match.
        gallery: everything that is ranked in any trial, in the manifest's order.
        image_root: folder that the records' paths are relative to.
        rule: what is ignored for each query.
        trials: for each trial the gallery indices that take part, ascending; empty: one trial with all of them.
        average_precision: definition, as in ``evaluate_ranking``.
        cmc: definition, as in ``evaluate_ranking``.
        skipped: queries left out because nothing can match them.
        split: what in ``variant`` names the split, where the manifest is one of several.
        ranks_captions: the gallery are captions: records of the images that they describe, each with its one caption
            and ``<image id>#<number>`` for an id.
        ignore_copies: whether a query's own file in the gallery is ignored, whatever the rule says.
        copied_queries: how many queries have their own file in the gallery, where the rule does not ignore it.
        unlike_published: how queries and gallery differ in number from the published ones; empty if they do not.
        cautions: what a reader has to know before figures of this protocol are quoted.
    """

    name: str
    variant: str
    queries: list[Query]
    gallery: list[ImageRecord]
    image_root: Path
    rule: Rule = "same_camera"
    trials: tuple[IntArray, ...] = ()
    average_precision: AveragePrecision = "mean"
    cmc: Cmc = "standard"
    skipped: tuple[SkippedQuery, ...] = ()
    split: str = ""
    ranks_captions: bool = False
    ignore_copies: bool = False
    copied_queries: int = 0
    unlike_published: str = ""
    cautions: tuple[str, ...] = ()

    @property
    def ties(self) -> Ties:
        """How equal scores are measured: ``top500`` cuts the list, and so needs one order of them."""
        return "index" if self.average_precision == "top500" else "expected"

    @property
    def trial_galleries(self) -> tuple[IntArray, ...]:
        """The gallery indices of every trial, of the only one too."""
        return self.trials or (np.arange(len(self.gallery)),)


@dataclass(frozen=True, slots=True)
class Labels:
    """Identities, cameras and clothes of a protocol as integer codes: (Q,) for the queries, (G,) for the gallery.

    ``copies`` has the gallery indices of a query's own file, where such are ignored.
    """

    query_person: IntArray
    gallery_person: IntArray
    query_camera: IntArray
    gallery_camera: IntArray
    query_clothes: IntArray
    gallery_clothes: IntArray
    rule: Rule
    same_room: tuple[int, int] = (-1, -1)
    copies: Mapping[int, IntArray] = field(default_factory=dict[int, IntArray])
    _places: dict[int, IntArray] = field(default_factory=dict[int, IntArray])

    def _list_same(self, query: int) -> IntArray:
        if not self._places:
            order = np.argsort(self.gallery_person, kind="stable")
            persons, starts = np.unique(self.gallery_person[order], return_index=True)
            self._places.update(zip(persons.tolist(), np.split(order, starts[1:]), strict=True))
        return self._places.get(int(self.query_person[query]), np.empty(0, np.int64))

    def _is_ignored(self, query: int, places: IntArray) -> BoolArray:
        """Return which of these gallery images, all of the query's identity, are ignored."""
        ignored = self._is_ignored_by_rule(query, places)
        return ignored | np.isin(places, self.copies[query]) if query in self.copies else ignored

    def _is_ignored_by_rule(self, query: int, places: IntArray) -> BoolArray:
        if self.rule == "nothing":
            return np.zeros(len(places), dtype=np.bool_)
        if self.rule == "same_room":
            hidden = self.query_camera[query] == self.same_room[0]
            return hidden & (self.gallery_camera[places] == self.same_room[1])
        camera = self.gallery_camera[places] == self.query_camera[query]
        clothes = self.gallery_clothes[places] == self.query_clothes[query]
        if self.rule == "cloth_changing":
            return camera | clothes
        return camera | ~clothes if self.rule == "same_clothes" else camera

    def find_ignored(self, query: int) -> BoolArray:
        """Return the mask (G,) of what is removed from the query's ranking."""
        if self.rule == "same_room":
            return self._is_ignored(query, np.arange(len(self.gallery_person)))
        mask = np.zeros(len(self.gallery_person), dtype=np.bool_)
        same = self._list_same(query)
        mask[same] = self._is_ignored(query, same)
        if query in self.copies:  # labelled as somebody else, too
            mask[self.copies[query]] = True
        return mask

    def list_positives(self, query: int) -> IntArray:
        """Return the gallery indices of the query's matches."""
        same = self._list_same(query)
        return same[~self._is_ignored(query, same)]

    def find_positives(self, query: int) -> BoolArray:
        """Return the mask (G,) of the query's matches."""
        mask = np.zeros(len(self.gallery_person), dtype=np.bool_)
        mask[self.list_positives(query)] = True
        return mask

    def take_gallery(self, places: IntArray) -> "Labels":
        """Return the labels of one trial, whose gallery are these places."""
        person, camera, clothes = self.gallery_person, self.gallery_camera, self.gallery_clothes
        inside = {query: own[np.isin(own, places)] for query, own in self.copies.items()}
        queries = self.query_person, self.query_camera, self.query_clothes
        return Labels(
            queries[0],
            person[places],
            queries[1],
            camera[places],
            queries[2],
            clothes[places],
            self.rule,
            self.same_room,
            {query: np.searchsorted(places, own) for query, own in inside.items()},
        )


def _encode(values: Sequence[Any], queries: int) -> tuple[IntArray, IntArray]:
    codes = np.unique(np.asarray(values, dtype=str), return_inverse=True)[1].astype(np.int64)
    return codes[:queries], codes[queries:]


def label_protocol(protocol: Protocol) -> Labels:
    """Return the protocol's identities, cameras and clothes as integer codes, fast to compare."""
    records: list[Query | ImageRecord] = [*protocol.queries, *protocol.gallery]
    count = len(protocol.queries)
    persons = _encode([record.person_id for record in records], count)
    names = [record.camera_id for record in records]
    if protocol.rule == "same_image":  # as if each image had a camera of its own
        names = [record.query_id if isinstance(record, Query) else record.image_id for record in records]
    cameras = _encode(names, count)
    # Records without an outfit wear one of their own each, which equals no other.
    clothes = _encode([record.clothes_id or f"?{place}" for place, record in enumerate(records)], count)
    codes = dict(zip(names, np.concatenate(cameras).tolist(), strict=True))
    room = codes.get(SYSU_QUERY_CAMERA, -1), codes.get(SYSU_GALLERY_CAMERA, -1)
    copies = _find_copies(protocol) if protocol.ignore_copies else {}
    sides = *persons, *cameras, *clothes
    return Labels(*sides, protocol.rule, room, copies)


def _find_copies(protocol: Protocol) -> Mapping[int, IntArray]:
    """Return ``find_copies`` of the protocol; a caption is no copy of the image that it describes."""
    return {} if protocol.ranks_captions else find_copies(protocol.queries, protocol.gallery)


def count_copied_queries(protocol: Protocol) -> int:
    """Return how many queries have their own file in the gallery, where the rule does not ignore it."""
    copies = _find_copies(protocol)
    if not copies:
        return 0
    labels = label_protocol(replace(protocol, ignore_copies=False))
    return sum(not labels.find_ignored(query)[places].all() for query, places in copies.items())

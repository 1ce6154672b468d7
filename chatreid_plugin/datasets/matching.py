"""What matches a query and what is ignored: identities, cameras and clothes as integer codes, fast to compare."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..archives import BoolArray, IntArray
from ..records import ImageRecord
from .benchmark import Benchmark, Query, Rule


IgnoreMask = Callable[[int], BoolArray]  # a query's index to the mask (G,) of what is ignored
SYSU_QUERY_CAMERA, SYSU_GALLERY_CAMERA = "3", "2"


def _make_no_codes() -> IntArray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Labels:
    """Identities, cameras and clothes of a benchmark as integer codes: (Q,) for the queries, (G,) for the gallery.

    ``copies`` has the gallery indices of a query's own file, where such are ignored. ``ignore`` stands in for a rule
    that a caller has made. ``names`` are the queries' identities for messages, where they are no codes.
    """

    query_person: IntArray
    gallery_person: IntArray
    query_camera: IntArray = field(default_factory=_make_no_codes)
    gallery_camera: IntArray = field(default_factory=_make_no_codes)
    query_clothes: IntArray = field(default_factory=_make_no_codes)
    gallery_clothes: IntArray = field(default_factory=_make_no_codes)
    rule: Rule = "nothing"
    same_room: tuple[int, int] = (-1, -1)
    copies: Mapping[int, IntArray] = field(default_factory=dict[int, IntArray])
    ignore: IgnoreMask | None = None
    names: Sequence[Any] = ()
    _places: dict[int, IntArray] = field(default_factory=dict[int, IntArray])

    def _list_same(self, query: int) -> IntArray:
        if not self._places and len(self.gallery_person):
            order = np.argsort(self.gallery_person, kind="stable")
            persons, starts = np.unique(self.gallery_person[order], return_index=True)
            self._places.update(zip(persons.tolist(), np.split(order, starts[1:]), strict=True))
        return self._places.get(int(self.query_person[query]), np.empty(0, np.int64))

    def _is_ignored(self, query: int, places: IntArray) -> BoolArray:
        """Return which of these gallery images, all of the query's identity, are ignored."""
        ignored = self._is_ignored_by_rule(query, places)
        return ignored | np.isin(places, self.copies[query]) if query in self.copies else ignored

    def _is_ignored_by_rule(self, query: int, places: IntArray) -> BoolArray:
        if self.ignore is not None:
            return self.ignore(query)[places]
        if self.rule == "nothing":
            return np.zeros(len(places), dtype=np.bool_)
        if self.rule == "same_room":
            hidden = self.query_camera[query] == self.same_room[0]
            return hidden & (self.gallery_camera[places] == self.same_room[1])
        camera = self.gallery_camera[places] == self.query_camera[query]
        if self.rule in ("same_camera", "same_image"):
            return camera
        clothes = self.gallery_clothes[places] == self.query_clothes[query]
        return camera | clothes if self.rule == "cloth_changing" else camera | ~clothes

    def find_ignored(self, query: int) -> BoolArray:
        """Return the mask (G,) of what is removed from the query's ranking."""
        if self.rule == "same_room" or self.ignore is not None:
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

    def find(self, query: int) -> tuple[IntArray, npt.NDArray[Any]]:
        """Return the indices of the query's matches, ascending, and the indices or a mask of all but its negatives."""
        same = self._list_same(query)
        matches = same[~self._is_ignored(query, same)]
        if self.rule != "same_room" and self.ignore is None and query not in self.copies:
            return matches, same
        excluded = self.find_ignored(query).copy()
        excluded[same] = True
        return matches, excluded

    def explain_unmatched(self, query: int) -> str:
        """Say why nothing in the gallery can match a query."""
        name = self.names[query] if len(self.names) else self.query_person[query]
        if not len(self._list_same(query)):
            return f"query {query} (identity {name}): identity absent from the gallery"
        own = " (only seen by the query's own camera)" if self.rule == "same_camera" else ""
        return f"query {query} (identity {name}): all its gallery images are ignored{own}"

    def find_positives(self, query: int) -> BoolArray:
        """Return the mask (G,) of the query's matches."""
        mask = np.zeros(len(self.gallery_person), dtype=np.bool_)
        mask[self.list_positives(query)] = True
        return mask

    def take_gallery(self, places: IntArray) -> "Labels":
        """Return the labels of one trial, whose gallery are these places."""
        return replace(
            self,
            gallery_person=self.gallery_person[places],
            gallery_camera=self.gallery_camera[places],
            gallery_clothes=self.gallery_clothes[places],
            copies={query: np.searchsorted(places, own[np.isin(own, places)]) for query, own in self.copies.items()},
            _places={},
        )


def _encode(values: Sequence[Any], queries: int) -> tuple[IntArray, IntArray]:
    codes = np.unique(np.asarray(values, dtype=str), return_inverse=True)[1].astype(np.int64)
    return codes[:queries], codes[queries:]


def label_benchmark(benchmark: Benchmark) -> Labels:
    """Return its identities, cameras and clothes as integer codes, fast to compare."""
    records: list[Query | ImageRecord] = [*benchmark.queries, *benchmark.gallery]
    count = len(benchmark.queries)
    persons = _encode([record.person_id for record in records], count)
    names = [record.camera_id for record in records]
    if benchmark.rule == "same_image":  # as if each image had a camera of its own
        names = [record.query_id if isinstance(record, Query) else record.image_id for record in records]
    cameras = _encode(names, count)
    # Records without an outfit wear one of their own each, which equals no other.
    clothes = _encode([record.clothes_id or f"?{place}" for place, record in enumerate(records)], count)
    codes = dict(zip(names, np.concatenate(cameras).tolist(), strict=True))
    room = codes.get(SYSU_QUERY_CAMERA, -1), codes.get(SYSU_GALLERY_CAMERA, -1)
    copies = _find_copies(benchmark) if benchmark.ignore_copies else {}
    sides = *persons, *cameras, *clothes
    return Labels(*sides, benchmark.rule, room, copies)


def _name_file(record: ImageRecord) -> str:
    """Return what is the same for two records of one file: the hash of its bytes, or its path if nobody looked."""
    return record.content_hash or record.path


def _find_copies(benchmark: Benchmark) -> Mapping[int, IntArray]:
    """Return the gallery indices, ascending, of each query's own file; queries without any are left out.

    A caption is no copy of the image that it describes.
    """
    if benchmark.ranks_captions:
        return {}
    asked = {number: _name_file(query.image) for number, query in enumerate(benchmark.queries) if query.image}
    names, places = set(asked.values()), dict[str, list[int]]()
    for place, record in enumerate(benchmark.gallery):
        if (name := _name_file(record)) in names:
            places.setdefault(name, []).append(place)
    return {number: np.array(places[name], dtype=np.int64) for number, name in asked.items() if name in places}


def count_copied_queries(benchmark: Benchmark) -> int:
    """Return how many queries have their own file in the gallery, where the rule does not ignore it."""
    copies = _find_copies(benchmark)
    if not copies:
        return 0
    labels = label_benchmark(replace(benchmark, ignore_copies=False))
    return sum(not labels.find_ignored(query)[places].all() for query, places in copies.items())

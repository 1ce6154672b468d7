"""Which gallery items match a query, are ignored or are negatives; used by ``metrics``, one query at a time."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError
from .arrays import BoolArray, IntArray
from .inputs import check_comparable, read_array, read_labels


IgnoreMask = Callable[[int], BoolArray]
Ignore = Literal["same_camera", "nothing"] | IgnoreMask | None

EXAMPLES_SHOWN = 10


def _encode(queries: list[Any], gallery: list[Any]) -> tuple[IntArray, IntArray]:
    """Return integer codes (Q,) and (G,) that are equal where labels are; -1: not in the gallery."""
    codes: dict[Any, int] = {}
    gallery_codes = [codes.setdefault(label, len(codes)) for label in gallery]
    query_codes = [codes.get(label, -1) for label in queries]
    return np.array(query_codes, dtype=np.int64), np.array(gallery_codes, dtype=np.int64)


class Matches:
    """The labels and the ignore rule of ``evaluate_ranking``; its errors are raised by the same causes.

    ``codes`` (G,) has each gallery item's identity as an integer from 0 on.
    """

    def __init__(self, query_person: Any, gallery_person: Any, query_camera: Any, gallery_camera: Any, ignore: Ignore):
        if ignore is not None and not callable(ignore) and str(ignore) not in ("same_camera", "nothing"):
            raise ConfigError(
                f'ignore is {ignore!r}; choose "same_camera", "nothing", or a function from a query\'s index to a '
                "boolean mask of the gallery."
            )
        if ignore is None and not (query_camera is None and gallery_camera is None):
            raise ConfigError(
                'Cameras are given, but ignore does not say what to do with them. Set ignore="same_camera" to remove '
                "the images of the query's own identity and camera, as Market-1501 and most benchmarks do, or "
                'ignore="nothing" to rank the whole gallery.'
            )
        self.query_person = read_labels(query_person, "query_person")
        gallery = read_labels(gallery_person, "gallery_person")
        check_comparable(self.query_person, gallery, "Identities")
        self.gallery_size = len(gallery)
        self.query_codes, self.codes = _encode(self.query_person, gallery)
        order = np.argsort(self.codes, kind="stable")
        self.places: list[IntArray] = np.split(order, np.flatnonzero(np.diff(self.codes[order])) + 1)
        self.ignore = ignore
        self.cameras = self._read_cameras(query_camera, gallery_camera) if ignore == "same_camera" else None

    def _read_cameras(self, query_camera: Any, gallery_camera: Any) -> tuple[IntArray, IntArray]:
        if query_camera is None or gallery_camera is None:
            raise ConfigError('ignore="same_camera" needs query_camera and gallery_camera.')
        queries, gallery = read_labels(query_camera, "query_camera"), read_labels(gallery_camera, "gallery_camera")
        if len(queries) != len(self.query_person) or len(gallery) != self.gallery_size:
            raise DataError(
                f"{len(queries)} query and {len(gallery)} gallery cameras do not fit "
                f"{len(self.query_person)} queries and {self.gallery_size} gallery items."
            )
        check_comparable(queries, gallery, "Cameras")
        return _encode(queries, gallery)

    def find(self, query: int) -> tuple[IntArray, npt.NDArray[Any]]:
        """Return the indices of the query's positives, ascending, and an index array or mask of all non-negatives."""
        code = int(self.query_codes[query])
        same = self.places[code] if code >= 0 else np.empty(0, np.int64)
        if self.cameras is not None:
            return same[self.cameras[1][same] != self.cameras[0][query]], same
        if not callable(self.ignore):
            return same, same
        mask = read_array(self.ignore(query), f"ignore({query})").astype(np.bool_)
        if mask.shape != (self.gallery_size,):
            raise DataError(f"ignore({query}) has shape {mask.shape}; expected ({self.gallery_size},).")
        excluded = mask.copy()
        excluded[same] = True
        return same[~mask[same]], excluded

    def explain_invalid(self, queries: Sequence[int]) -> str:
        """Say for the first few queries why nothing in the gallery can match them."""
        shown: list[str] = []
        for query in queries[:EXAMPLES_SHOWN]:
            known = self.query_codes[query] >= 0
            shown.append(
                f"query {query} (identity {self.query_person[query]}): "
                + ("all its gallery images are ignored" if known else "identity absent from the gallery")
                + (" (only seen by the query's own camera)" if known and self.cameras is not None else "")
            )
        return "; ".join(shown)

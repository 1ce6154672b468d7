"""What a caller hands to ``metrics``: scores and labels as plain arrays and codes, or refused with the reason."""

import operator
from collections.abc import Callable, Iterable, Iterator
from numbers import Number
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..archives import BoolArray, IntArray, advise_shape
from ..datasets.matching import IgnoreMask, Labels
from ..errors import ConfigError, DataError


Ignore = Literal["same_camera", "nothing"] | IgnoreMask | None

# Up to here float64 holds every whole number.
LARGEST_WHOLE = 2**53


def read_array(values: Any, what: str) -> npt.NDArray[Any]:
    """Return an array, list or torch tensor as an array, whatever the tensor's device, gradient and type of floats.

    Raises:
        DataError: masked values, or what is no array.
    """
    if np.ma.is_masked(values):
        raise DataError(f"{what}: a masked array, and what is masked has no value. Fill it or leave it out.")
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            # NumPy knows no bfloat16.
            values = values.float() if values.is_floating_point() and values.element_size() < 4 else values
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what}: no array of numbers ({error}).") from None


def _check_matrix(scores: Any, wanted: tuple[int, int]) -> None:
    """Refuse an array that cannot hold a row for each query."""
    shape = getattr(scores, "shape", None)
    if isinstance(shape, tuple) and shape and shape != wanted:
        found = tuple(int(side) for side in shape)
        advice = advise_shape(found, wanted, "scores")
        raise DataError(f"scores have shape {found}; expected (queries, gallery) = {wanted}.{advice}")


def iterate_rows(scores: Any, query_count: int, gallery_size: int) -> Iterator[Any]:
    """Yield the rows; refuse a matrix of another shape, and a surplus of rows before it is measured."""
    _check_matrix(scores, (query_count, gallery_size))
    try:
        rows: Iterable[Any] = iter(scores)
    except TypeError:
        raise DataError(f"scores must be (Q, G), or rows one after another, not {type(scores).__name__}.") from None
    for query, row in enumerate(rows):
        if query >= query_count:
            raise DataError(f"More rows of scores than the {query_count} queries.")
        yield row


def read_row(row: Any, query: int, gallery_size: int) -> npt.NDArray[np.floating]:
    """Return the scores (G,) of one query as float32 or float64 that order and tie exactly as they do.

    Raises:
        DataError: a wrong shape, NaN or infinite values, or no real numbers.
    """
    values = read_array(row, f"Scores of query {query}")
    if values.shape != (gallery_size,):
        advice = advise_shape(values.shape, (gallery_size,), "row")
        raise DataError(f"Scores of query {query} have shape {values.shape}; expected ({gallery_size},).{advice}")
    if values.dtype.kind not in "fiub":
        raise DataError(f"Scores of query {query} are of type {values.dtype}; they must be real numbers.")
    if not np.isfinite(values).all():
        wrong = np.flatnonzero(~np.isfinite(values))
        raise DataError(
            f"Scores of query {query} hold {len(wrong)} NaN or infinite value(s), first at gallery item {wrong[0]}; "
            "a ranking of them would mean nothing. Check the features or the model that gave them."
        )
    if values.dtype.type in (np.float32, np.float64):
        return values
    large = values.dtype.kind in "iu" and (values > LARGEST_WHOLE).any() | (values < -LARGEST_WHOLE).any()
    if large or values.dtype.itemsize > 8:
        # Their places among the distinct values: float64 would make ties of neighbours.
        return np.unique(values, return_inverse=True)[1].astype(np.float64)
    return values.astype(np.float32 if values.dtype == np.float16 else np.float64)


def read_labels(values: Any, what: str) -> list[Any]:
    """Return labels (N,) of any kind that can be compared and hashed: numbers, texts, tuples, None.

    Raises:
        DataError: not one label for each item, NaN, or labels without a hash.
    """
    if isinstance(values, np.ndarray) or hasattr(values, "detach"):
        array = read_array(values, what)
        if array.ndim != 1:
            raise DataError(f"{what} has shape {array.shape}; it must hold one label for each item, (N,).")
        labels: list[Any] = array.tolist()
    else:
        try:
            labels = [value.item() if getattr(value, "shape", None) == () else value for value in values]
        except TypeError:
            raise DataError(f"{what} is {values!r}; it must hold one label for each item, (N,).") from None
    for place, label in enumerate(labels):
        try:
            hash(label)
            equal = bool(label == label)
        except (TypeError, ValueError):
            equal = False
        if not equal:
            raise DataError(f"{what}[{place}] is {label!r}, which equals nothing; use numbers, texts or tuples.")
    return labels


def check_comparable(queries: list[Any], gallery: list[Any], what: str) -> None:
    """Refuse labels of which none can be equal, being of different types such as 1 and "1"."""

    def list_kinds(labels: list[Any]) -> set[str]:
        return {"number" if isinstance(label, Number) else type(label).__name__ for label in labels}

    if not queries or not gallery or not set(queries).isdisjoint(gallery):
        return
    if list_kinds(queries).isdisjoint(list_kinds(gallery)):
        raise DataError(
            f"{what} of queries and gallery are of different types, such as {queries[0]!r} and {gallery[0]!r}, which "
            "are never equal. Convert both to one type."
        )


def _encode(queries: list[Any], gallery: list[Any]) -> tuple[IntArray, IntArray]:
    """Return integer codes (Q,) and (G,) that are equal where labels are; -1: not in the gallery."""
    codes: dict[Any, int] = {}
    gallery_codes = [codes.setdefault(label, len(codes)) for label in gallery]
    query_codes = [codes.get(label, -1) for label in queries]
    return np.array(query_codes, dtype=np.int64), np.array(gallery_codes, dtype=np.int64)


def read_matching(
    query_person: Any, gallery_person: Any, query_camera: Any, gallery_camera: Any, ignore: Ignore
) -> Labels:
    """Return the codes and the rule by which ``evaluate_ranking`` matches; arguments and errors are its own."""
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
    queries, gallery = read_labels(query_person, "query_person"), read_labels(gallery_person, "gallery_person")
    check_comparable(queries, gallery, "Identities")
    persons = _encode(queries, gallery)
    if ignore == "same_camera":
        cameras = _read_cameras(query_camera, gallery_camera, len(queries), len(gallery))
        return Labels(*persons, *cameras, rule="same_camera", names=queries)
    mask = _check_masks(ignore, len(gallery)) if callable(ignore) else None
    return Labels(*persons, rule="nothing", ignore=mask, names=queries)


def _read_cameras(query_camera: Any, gallery_camera: Any, queries: int, gallery: int) -> tuple[IntArray, IntArray]:
    if query_camera is None or gallery_camera is None:
        raise ConfigError('ignore="same_camera" needs query_camera and gallery_camera.')
    asked, ranked = read_labels(query_camera, "query_camera"), read_labels(gallery_camera, "gallery_camera")
    if len(asked) != queries or len(ranked) != gallery:
        raise DataError(
            f"{len(asked)} query and {len(ranked)} gallery cameras do not fit {queries} queries and {gallery} gallery "
            "items."
        )
    check_comparable(asked, ranked, "Cameras")
    return _encode(asked, ranked)


def _check_masks(ignore: Callable[[int], Any], gallery: int) -> IgnoreMask:
    def find(query: int) -> BoolArray:
        mask = read_array(ignore(query), f"ignore({query})").astype(np.bool_)
        if mask.shape != (gallery,):
            raise DataError(f"ignore({query}) has shape {mask.shape}; expected ({gallery},).")
        return mask

    return find


def read_topk(topk: Any) -> tuple[int, ...]:
    """Return the CMC's ranks.

    Raises:
        ConfigError: none, or other than whole numbers from 1 on.
    """
    try:
        ranks = tuple(operator.index(k) for k in topk)
    except TypeError:
        ranks = ()
    if not ranks or min(ranks) < 1:
        raise ConfigError(f"topk is {topk!r}; give whole numbers from 1 on, such as (1, 5, 10, 20).")
    return ranks


def read_retrieved(retrieved: Any, query_count: int) -> list[int]:
    """Return how many items of each ranking were returned, (Q,).

    Raises:
        DataError: other than one whole number from 0 on for each query.
    """
    counts = read_array(retrieved, "retrieved")
    if counts.shape != (query_count,) or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise DataError(
            f"retrieved must hold a whole number from 0 on for each of {query_count} queries; it has shape "
            f"{counts.shape}, type {counts.dtype}" + (f" and starts with {counts.flat[0]}." if counts.size else ".")
        )
    return counts.tolist()

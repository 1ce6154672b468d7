"""Scores and features of other models, read from files: ``backend: scores``, ``backend: features``, ``filter: npz``.

An image is called by its path as in the manifest or by its id, a caption ``<path>#<number>``, numbers from 0; words
without an image (attributes) by the query's id. Files may hold more than is needed, in any order.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError
from ..eval_settings import EvalSettings
from ..records import ImageRecord
from .filtering import iterate_similarities
from .protocols import Protocol
from .queries import Query
from .ties import IntArray, ScoreArray


Array = npt.NDArray[Any]

EXAMPLES_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Matrix:
    """A model's scores of every pair, not all in memory: a matrix, or the features it is the product of."""

    path: Path
    values: Array | None
    query_rows: IntArray
    gallery_columns: IntArray
    query_features: ScoreArray | None = None
    gallery_features: ScoreArray | None = None

    def iterate_rows(self) -> Iterator[ScoreArray]:
        """Yield the scores (G,) of each query, as the protocol numbers queries and gallery."""
        if self.query_features is not None and self.gallery_features is not None:
            yield from iterate_similarities(self.query_features, self.gallery_features)
        elif self.values is not None:
            for row in self.query_rows.tolist():
                yield np.asarray(self.values[row])[self.gallery_columns]


def _open(path: Path, wanted: Sequence[str]) -> dict[str, Array]:
    """Return the arrays of an .npz that are among ``wanted``."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in wanted if name in archive.files}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no readable .npz file: {error}") from None


def list_query_names(query: Query) -> tuple[str, ...]:
    """Return what a file may call the query: its id without the data set, which is a path, or its id."""
    return query.query_id.partition("/")[2] or query.query_id, query.query_id


def list_image_names(record: ImageRecord) -> tuple[str, ...]:
    """Return what a file may call a gallery image: its path or its id."""
    return record.path, record.image_id


def _find_rows(names: Array, wanted: Sequence[tuple[str, ...]], path: Path, what: str) -> IntArray:
    rows: Mapping[str, int] = {str(name): row for row, name in enumerate(names.tolist())}
    found = [next((rows[name] for name in called if name in rows), None) for called in wanted]
    missing = [called[0] for called, row in zip(wanted, found, strict=True) if row is None]
    if missing:
        shown = "".join(f"\n  {name}" for name in missing[:EXAMPLES_SHOWN])
        raise DataError(
            f"{path} lacks the {what} of {len(missing)} image(s):{shown}\nPaths are as in the manifest, "
            "captions are <path>#<number>."
        )
    return np.array(found, dtype=np.int64)


def _take_features(
    arrays: Mapping[str, Array], prefix: str, wanted: Sequence[tuple[str, ...]], path: Path
) -> ScoreArray:
    names, features = arrays[f"{prefix}paths"], arrays[f"{prefix}features"]
    if features.ndim != 2 or names.shape != (len(features),):
        raise DataError(
            f"{path}: {prefix}paths {names.shape} and {prefix}features {features.shape} must be (N,) and (N, D)."
        )
    return cast(ScoreArray, features[_find_rows(names, wanted, path, "features")])


def read_features(
    path: Path, queries: Sequence[tuple[str, ...]], gallery: Sequence[tuple[str, ...]]
) -> tuple[ScoreArray, ScoreArray]:
    """Return the features (Q, D) and (G, D) of what is called so, as they stand in the file.

    The file has ``paths`` (N,) and ``features`` (N, D), or ``query_paths``, ``query_features``, ``gallery_paths`` and
    ``gallery_features``, where queries and gallery were encoded apart.

    Raises:
        DataError: no such file or arrays, shapes that do not fit, or names that are missing.
    """
    names = ("paths", "features")
    apart = tuple(f"{side}_{name}" for side in ("query", "gallery") for name in names)
    arrays = _open(path, names + apart)
    if all(name in arrays for name in apart):
        found = _take_features(arrays, "query_", queries, path), _take_features(arrays, "gallery_", gallery, path)
    elif all(name in arrays for name in names):
        found = _take_features(arrays, "", queries, path), _take_features(arrays, "", gallery, path)
    else:
        raise DataError(
            f"{path} is no .npz with arrays `paths` and `features`, or {', '.join(f'`{name}`' for name in apart)} "
            f"(found: {', '.join(arrays) or 'none of them'})."
        )
    if found[0].shape[1] != found[1].shape[1]:
        raise DataError(f"{path}: query features have {found[0].shape[1]} columns and gallery {found[1].shape[1]}.")
    return found


def normalise(features: Array) -> ScoreArray:
    """Return L2-normalised rows (N, D), so that the dot product is the cosine."""
    features = features.astype(np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.float32(1e-12))


def _list_names(protocol: Protocol) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    queries = [list_query_names(query) for query in protocol.queries]
    return queries, [list_image_names(record) for record in protocol.gallery]


def read_protocol_features(path: Path, protocol: Protocol) -> tuple[ScoreArray, ScoreArray]:
    """Return the L2-normalised features (Q, D) of the protocol's queries and (G, D) of its gallery.

    Raises:
        DataError: see ``read_features``; or features that are not finite.
    """
    queries, gallery = read_features(path, *_list_names(protocol))
    for name, features in (("query", queries), ("gallery", gallery)):
        if not np.isfinite(features).all():
            raise DataError(f"{path}: {name} features hold NaN or infinite values; a ranking would mean nothing.")
    return normalise(queries), normalise(gallery)


def _read_feature_matrix(path: Path, protocol: Protocol) -> Matrix:
    """Return the cosine similarities of the file's features, for ``backend: features``."""
    empty = np.empty(0, dtype=np.int64)
    return Matrix(path, None, empty, empty, *read_protocol_features(path, protocol))


def _read_score_matrix(path: Path, protocol: Protocol) -> Matrix:
    """Return a file's scores, for ``backend: scores``; higher is better.

    The .npz has ``scores`` (Q, G), ``queries`` (Q,) and ``gallery`` (G,). A matrix that does not fit in memory is an
    .npy, which is mapped, with ``queries`` and ``gallery`` in the .npz of the same name beside it.

    Raises:
        DataError: no such file or arrays, shapes that do not fit, or names that are missing.
    """
    names_path = path.with_suffix(".npz")
    arrays = _open(names_path, ("queries", "gallery", *(("scores",) if path.suffix != ".npy" else ())))
    if path.suffix == ".npy":
        try:
            arrays["scores"] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no readable .npy file: {error}") from None
    missing = [name for name in ("scores", "queries", "gallery") if name not in arrays]
    if missing:
        raise DataError(f"{names_path} lacks the array(s) {', '.join(missing)}; it needs scores, queries and gallery.")
    scores, queries, gallery = arrays["scores"], arrays["queries"], arrays["gallery"]
    if scores.shape != (len(queries), len(gallery)):
        raise DataError(
            f"{path}: scores {scores.shape} must be (queries, gallery) = ({len(queries)}, {len(gallery)})."
        )
    wanted_queries, wanted_gallery = _list_names(protocol)
    return Matrix(
        path,
        scores,
        _find_rows(queries, wanted_queries, path, "scores"),
        _find_rows(gallery, wanted_gallery, path, "scores"),
    )


def read_matrix(settings: EvalSettings, protocol: Protocol) -> Matrix:
    """Return the scores of every pair that ``features`` or ``scores`` of the settings holds.

    Raises:
        ConfigError: the settings name no file.
        DataError: see ``read_features`` and ``_read_score_matrix``.
    """
    if settings.backend == "features" and settings.features is not None:
        return _read_feature_matrix(settings.features, protocol)
    if settings.scores is None:
        raise ConfigError("backend: scores needs scores, an .npz or .npy file.")
    return _read_score_matrix(settings.scores, protocol)

"""Scores and features of other models, read from files: ``backend: scores``, ``backend: features``, ``filter: npz``.

An image is called by its path as in the manifest or by its id, a caption ``<path>#<number>``, numbers from 0; words
without an image (attributes) by the query's id. Files may hold more than is needed, in any order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..archives import (
    Array,
    Names,
    check_shape,
    map_array,
    normalise,
    open_archive,
    read_features,
    read_names,
    refuse_missing,
)
from ..datasets.benchmark import Benchmark, Query
from ..errors import ConfigError, DataError
from ..eval_settings import ScoringSettings
from ..records import ImageRecord
from .arrays import IntArray, ScoreArray
from .filtering import iterate_similarities


@dataclass(frozen=True, slots=True)
class Matrix:
    """A model's scores of every pair, not all in memory: a matrix, or the features it is the product of.

    ``may_lack``: NaN stands for a pair that was not scored, as the file says (``matrix_file``).
    """

    path: Path
    values: Array | None
    query_rows: IntArray
    gallery_columns: IntArray
    query_features: ScoreArray | None = None
    gallery_features: ScoreArray | None = None
    may_lack: bool = False

    def iterate_rows(self) -> Iterator[ScoreArray]:
        """Yield the scores (G,) of each query, as the protocol numbers queries and gallery."""
        if self.query_features is not None and self.gallery_features is not None:
            yield from iterate_similarities(self.query_features, self.gallery_features)
        elif self.values is not None:
            for row in self.query_rows.tolist():
                yield np.asarray(self.values[row])[self.gallery_columns]

    def count_scores(self) -> int:
        """Return how many pairs have a score."""
        if self.may_lack:
            return sum(int(np.count_nonzero(~np.isnan(row))) for row in self.iterate_rows())
        if self.query_features is not None and self.gallery_features is not None:
            return len(self.query_features) * len(self.gallery_features)
        return len(self.query_rows) * len(self.gallery_columns)


def list_query_names(query: Query) -> Names:
    """Return what a file may call the query: its id without the data set, which mostly is a path, its id, its path."""
    names = [query.query_id.partition("/")[2] or query.query_id, query.query_id]
    if query.image is not None and query.query_id == query.image.image_id:
        names.append(query.image.path)
    return tuple(names)


def list_image_names(record: ImageRecord) -> Names:
    """Return what a file may call a gallery image: its path or its id."""
    return record.path, record.image_id


def _list_names(protocol: Benchmark) -> tuple[list[Names], list[Names]]:
    """Return what a file may call the queries and the gallery; captions also by the path of their image."""
    paths = {record.image_id: record.path for record in protocol.gallery}
    paths |= {query.image.image_id: query.image.path for query in protocol.queries if query.image is not None}
    queries: list[Names] = []
    for query in protocol.queries:
        image, mark, number = query.query_id.rpartition("#")
        caption = (f"{paths[image]}#{number}",) if mark and image in paths else ()
        queries.append((*list_query_names(query), *caption))
    if not protocol.ranks_captions:
        return queries, [list_image_names(record) for record in protocol.gallery]
    numbers = [record.image_id.rpartition("#")[2] for record in protocol.gallery]
    pairs = zip(protocol.gallery, numbers, strict=True)
    return queries, [(f"{record.path}#{number}", record.image_id) for record, number in pairs]


def read_protocol_features(path: Path, protocol: Benchmark) -> tuple[ScoreArray, ScoreArray]:
    """Return the L2-normalised features (Q, D) of the protocol's queries and (G, D) of its gallery.

    Raises:
        DataError: see ``read_features``.
    """
    names = _list_names(protocol)
    queries, gallery = read_features(path, list(zip(("queries", "gallery images"), names, strict=True)))
    return normalise(queries), normalise(gallery)


def _read_feature_matrix(path: Path, protocol: Benchmark) -> Matrix:
    """Return the cosine similarities of the file's features, for ``backend: features``."""
    empty = np.empty(0, dtype=np.int64)
    return Matrix(path, None, empty, empty, *read_protocol_features(path, protocol))


def _read_score_matrix(path: Path, protocol: Benchmark) -> Matrix:
    """Return a file's scores, for ``backend: scores``; higher is better.

    The .npz has ``scores`` (Q, G), ``queries`` (Q,) and ``gallery`` (G,). A matrix that does not fit in memory is an
    .npy, which is mapped, with ``queries`` and ``gallery`` in the .npz of the same name beside it. ``not_scored``, if
    it is there, says that NaN stands for a pair without a score.

    Raises:
        DataError: no such file or arrays, shapes that do not fit, or names that are missing.
    """
    names_path = path.with_suffix(".npz")
    wanted = ("queries", "gallery", "not_scored", *(("scores",) if path.suffix != ".npy" else ()))
    arrays = open_archive(names_path, wanted)
    if path.suffix == ".npy":
        arrays["scores"] = map_array(path)
    missing = [name for name in ("scores", "queries", "gallery") if name not in arrays]
    if missing:
        raise DataError(f"{names_path} lacks the array(s) {', '.join(missing)}; it needs scores, queries and gallery.")
    scores = arrays["scores"]
    queries, gallery = (read_names(arrays[name], names_path) for name in ("queries", "gallery"))
    check_shape(path, "scores", scores, (len(queries.names), len(gallery.names)), "queries and gallery")
    wanted_queries, wanted_gallery = _list_names(protocol)
    rows = queries.find_rows(wanted_queries, scores.__getitem__)
    columns = gallery.find_rows(wanted_gallery, lambda column: scores[:, column])
    sides = ("queries", queries, wanted_queries, rows), ("gallery images", gallery, wanted_gallery, columns)
    query_rows, gallery_columns = refuse_missing("scores", sides)
    return Matrix(path, scores, query_rows, gallery_columns, may_lack="not_scored" in arrays)


def check_row(row: Array, query: int, protocol: Benchmark, matrix: Matrix) -> None:
    """Refuse a query's scores (G,) that are not finite, or too large for the float32 of the files that are written.

    NaN is no score where the file says so.

    Raises:
        DataError: naming the file, the query and the first image.
    """
    name, largest = protocol.queries[query].label, np.finfo(np.float32).max
    bad = np.isinf(row) if matrix.may_lack else ~np.isfinite(row)
    wrong = np.flatnonzero(bad)
    if len(wrong):
        raise DataError(
            f"{matrix.path}: {len(wrong)} score(s) of query {name} are NaN or infinite, first that of "
            f"{protocol.gallery[wrong[0]].path}; a ranking of them would mean nothing. Check the model that gave them."
        )
    highest = np.abs(row[~np.isnan(row)]).max(initial=0)
    if row.dtype.itemsize > 4 and highest > largest:
        raise DataError(
            f"{matrix.path}: scores of query {name} reach {highest:g}, more than float32 holds ({largest:.2g}). "
            "Save them divided by a number; the ranking stays the same."
        )


def read_matrix(scoring: ScoringSettings, protocol: Benchmark) -> Matrix:
    """Return the scores of every pair that ``features`` or ``scores`` of the settings holds.

    Raises:
        ConfigError: the settings name no file.
        DataError: see ``read_features`` and ``_read_score_matrix``.
    """
    if scoring.backend == "features" and scoring.features is not None:
        return _read_feature_matrix(scoring.features, protocol)
    if scoring.scores is None:
        raise ConfigError("scoring.backend: scores needs scoring.scores, an .npz or .npy file.")
    return _read_score_matrix(scoring.scores, protocol)

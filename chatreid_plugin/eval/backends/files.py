"""Scorers that run no model: chance, perfection, the baseline's own features, and scores that another program wrote.

An image in a file is called by its path as in the manifest or by its id, a caption ``<path>#<number>``, numbers from
0; words without an image (attributes) by the query's id. Files may hold more than is needed, in any order.

``save_matrix`` writes all scores of an evaluation into a file which ``backend: scores`` reads again: ``scores`` (Q, G)
float32 in the manifest's order, NaN where a pair was not scored; ``queries`` (Q,) and ``gallery`` (G,), their ids;
``not_scored``, which says that NaN means that. An .npz holds all of them, an .npy the scores alone (so that they can
be mapped), with the other arrays in the .npz of the same name.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import xxhash

from ...archives import Array, IntArray, ScoreArray, check_shape, map_array, open_archive, read_names, refuse_missing
from ...datasets.benchmark import Benchmark, Query
from ...errors import ConfigError, DataError
from ...records import ImageRecord
from ...shards import open_atomically
from ..filter import iterate_similarities, list_names, number_distinct, read_benchmark_features
from ..settings import ScoringSettings


Vectors = Mapping[str, ScoreArray]  # query id or image id to an L2-normalised vector (D,)


class ModelFreeScorer:
    """Needs no model: has nothing to prepare, and scores the candidates of a window as it scores pairs."""

    filled = 0

    def prepare(
        self, queries: Sequence[Query], gallery: Sequence[ImageRecord], planned: Sequence[ImageRecord] = ()
    ) -> None:
        """Nothing to prepare."""

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Return one score a candidate, (K,)."""
        raise NotImplementedError

    def choose(self, query: Query, windows: Sequence[Sequence[ImageRecord]], task: str) -> list[ScoreArray]:
        """Return each window's scores, (N,) each."""
        return [self.score_pairs(query, window, task) for window in windows]


class RandomScorer(ModelFreeScorer):
    """Uniform scores that depend on the query, the seed and the number of candidates alone: the lower bound."""

    confidence: Literal["none"] = "none"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.fingerprint: dict[str, Any] = {"seed": seed}

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Return uniform scores (K,)."""
        generator = np.random.default_rng([self.seed, zlib.crc32(query.query_id.encode())])
        return generator.random(len(candidates), dtype=np.float32)


class OracleScorer(ModelFreeScorer):
    """1 for the query's own identity and 0 else: the upper bound."""

    confidence: Literal["none"] = "none"

    def __init__(self, queries: Sequence[Query], gallery: Sequence[ImageRecord]) -> None:
        """Note the labels of all queries and of the whole gallery: scores depend on nothing else."""
        labels = [(query.query_id, query.person_id) for query in queries]
        labels += [(record.image_id, record.person_id) for record in gallery]
        self.fingerprint: dict[str, Any] = {"labels": xxhash.xxh3_128_hexdigest(json.dumps(labels).encode())}

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Return 1 or 0 for each candidate, (K,)."""
        return np.array([record.person_id == query.person_id for record in candidates], dtype=np.float32)


class FeatureScorer(ModelFreeScorer):
    """Cosine similarity of the filter's features: the baseline alone."""

    confidence: Literal["similarities"] = "similarities"

    def __init__(self, queries: Vectors, gallery: Vectors) -> None:
        self.queries, self.gallery = queries, gallery
        names = list(gallery)
        firsts = number_distinct(gallery.values()).tolist()
        self.equals = {name: names[first] for name, first in zip(names, firsts, strict=True)}
        digest = xxhash.xxh3_128()
        for name, vector in (*queries.items(), *gallery.items()):
            digest.update(name.encode())
            digest.update(vector.tobytes())
        # The features themselves: so nothing is missed that they come from, be it a file, weights or images.
        self.fingerprint: dict[str, Any] = {"features": digest.hexdigest()}

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Return the similarities (K,)."""
        if not candidates:
            return np.empty(0, dtype=np.float32)
        # Equal vectors are multiplied once, as in ``iterate_similarities``: only so do they tie.
        names = [self.equals[record.image_id] for record in candidates]
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        similarities = np.stack([self.gallery[name] for name in places]) @ self.queries[query.query_id]
        return similarities[[places[name] for name in names]]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A model's scores of every pair, not all in memory: a matrix, or the features it is the product of.

    ``may_lack``: NaN stands for a pair that was not scored, as the file says.
    """

    path: Path
    values: Array | None
    query_rows: IntArray
    gallery_columns: IntArray
    features: tuple[ScoreArray, ScoreArray] | None = None
    may_lack: bool = False

    def iterate_rows(self) -> Iterator[ScoreArray]:
        """Yield the scores (G,) of each query, as the benchmark numbers queries and gallery."""
        if self.features is not None:
            yield from iterate_similarities(*self.features)
        elif self.values is not None:
            for row in self.query_rows.tolist():
                yield np.asarray(self.values[row])[self.gallery_columns]

    def count_scores(self) -> int:
        """Return how many pairs have a score."""
        if self.may_lack:
            return sum(int(np.count_nonzero(~np.isnan(row))) for row in self.iterate_rows())
        if self.features is not None:
            return len(self.features[0]) * len(self.features[1])
        return len(self.query_rows) * len(self.gallery_columns)


def _read_score_matrix(path: Path, benchmark: Benchmark) -> Matrix:
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
    wanted_queries, wanted_gallery = list_names(benchmark)
    rows = queries.find_rows(wanted_queries, scores.__getitem__)
    columns = gallery.find_rows(wanted_gallery, lambda column: scores[:, column])
    sides = ("queries", queries, wanted_queries, rows), ("gallery images", gallery, wanted_gallery, columns)
    query_rows, gallery_columns = refuse_missing("scores", sides)
    return Matrix(path, scores, query_rows, gallery_columns, may_lack="not_scored" in arrays)


def check_row(row: Array, query: int, benchmark: Benchmark, matrix: Matrix) -> None:
    """Refuse a query's scores (G,) that are not finite, or too large for the float32 of the files that are written.

    NaN is no score where the file says so.

    Raises:
        DataError: naming the file, the query and the first image.
    """
    name, largest = benchmark.queries[query].label, np.finfo(np.float32).max
    bad = np.isinf(row) if matrix.may_lack else ~np.isfinite(row)
    wrong = np.flatnonzero(bad)
    if len(wrong):
        raise DataError(
            f"{matrix.path}: {len(wrong)} score(s) of query {name} are NaN or infinite, first that of "
            f"{benchmark.gallery[wrong[0]].path}; a ranking of them would mean nothing. Check the model that gave "
            "them."
        )
    highest = np.abs(row[~np.isnan(row)]).max(initial=0)
    if row.dtype.itemsize > 4 and highest > largest:
        raise DataError(
            f"{matrix.path}: scores of query {name} reach {highest:g}, more than float32 holds ({largest:.2g}). "
            "Save them divided by a number; the ranking stays the same."
        )


def read_matrix(scoring: ScoringSettings, benchmark: Benchmark) -> Matrix:
    """Return the scores of every pair that ``features`` or ``scores`` of the settings holds.

    Raises:
        ConfigError: the settings name no file.
        DataError: see ``read_features`` and ``_read_score_matrix``.
    """
    if scoring.backend == "features" and scoring.features is not None:
        empty = np.empty(0, dtype=np.int64)
        return Matrix(scoring.features, None, empty, empty, read_benchmark_features(scoring.features, benchmark))
    if scoring.scores is None:
        raise ConfigError("scoring.backend: scores needs scoring.scores, an .npz or .npy file.")
    return _read_score_matrix(scoring.scores, benchmark)


def check_target(path: Path) -> None:
    """Refuse a file that cannot be written, before days of scoring.

    Raises:
        ConfigError: names the folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output.save_matrix: the folder {path.parent} cannot be made: {error}. Set another."
        ) from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"output.save_matrix: {path} cannot be written. Set another file.")


def write_matrix(path: Path, benchmark: Benchmark, rows: Iterable[ScoreArray]) -> None:
    """Write the scores (G,) of each query, one after another, and the names; whole files or none.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    queries, gallery = benchmark.queries, benchmark.gallery
    names: dict[str, Array] = {
        "queries": np.array([query.query_id for query in queries]),
        "gallery": np.array([record.image_id for record in gallery]),
        "not_scored": np.array([np.nan], dtype=np.float32),
    }
    shape = len(queries), len(gallery)
    with ExitStack() as stack:
        archive_file = stack.enter_context(open_atomically(path.with_suffix(".npz")))
        if path.suffix == ".npy":
            with stack.enter_context(open_atomically(path)).open("wb") as file:
                write_rows(file, rows, shape)
        with ZipFile(archive_file, "w", ZIP_STORED) as archive:
            if path.suffix == ".npz":
                # A fixed date, so that equal scores are equal bytes; numpy.savez would need the matrix in memory.
                with archive.open(ZipInfo("scores.npy"), "w", force_zip64=True) as member:
                    write_rows(member, rows, shape)
            for name, values in names.items():
                with archive.open(ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)


def write_rows(file: IO[bytes], rows: Iterable[ScoreArray], shape: tuple[int, int]) -> None:
    """Write rows of float32, one after another, as the .npy of one array."""
    header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for row in rows:
        file.write(row.astype("<f4").tobytes())

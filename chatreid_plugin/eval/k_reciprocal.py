"""k-reciprocal encoding of baseline features: how alike two images' neighbours are; used by ``fusion``.

Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, as their released code
computes it: neighbours are sought among queries and gallery together. Everything is sparse: of N images only the
``k1`` or ``k2`` nearest neighbours of each are kept, never the N x N distances.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse
from tqdm import tqdm

from .arrays import FloatArray, IntArray, ScoreArray


ROWS_PER_CHUNK = 256
PAIRS_PER_CHUNK = 8192
SMALLEST_DISTANCE = 1e-6  # squared; below it float32 features are one point, and the quotient of two such is noise


def find_neighbours(features: ScoreArray, count: int) -> tuple[IntArray, FloatArray]:
    """Return each image's nearest images (N, count), itself first, and its largest distance to any (N,).

    Distances are squared Euclidean ones of L2-normalised features, 2 - 2 cos.
    """
    total = len(features)
    count = min(count, total)
    nearest = np.empty((total, count), dtype=np.int64)
    largest = np.empty(total)
    for start in tqdm(range(0, total, ROWS_PER_CHUNK), desc="k-reciprocal neighbours", unit="chunk"):
        similarities = features[start : start + ROWS_PER_CHUNK] @ features.T
        rows = np.arange(len(similarities))[:, None]
        largest[start : start + len(rows)] = 2.0 - 2.0 * similarities.min(axis=1)
        similarities[rows[:, 0], start + rows[:, 0]] = np.inf  # an exact duplicate must not come before the image
        best = np.argpartition(-similarities, count - 1, axis=1)[:, :count]
        order = np.argsort(-similarities[rows, best], axis=1, kind="stable")
        nearest[start : start + len(rows)] = best[rows, order]
    return nearest, np.maximum(largest, SMALLEST_DISTANCE)


def _mark(nearest: IntArray) -> Any:
    """Return the 0/1 matrix (N, N) with a one where the column is among the row's nearest."""
    total, count = nearest.shape
    ones = np.ones(total * count, dtype=np.float32)
    return sparse.csr_matrix((ones, nearest.ravel(), np.arange(0, total * count + 1, count)), shape=(total, total))


def _find_reciprocal(nearest: IntArray) -> Any:
    """Return R(p, k) as a 0/1 matrix: both are among each other's nearest."""
    marked = _mark(nearest)
    return marked.multiply(marked.T).tocsr()


def encode(features: ScoreArray, k1: int, k2: int) -> tuple[Any, FloatArray]:
    """Return each image's vector (N, N), sparse: weights of its k-reciprocal neighbours, summing to 1.

    R*(p, k1) adds R(q, k1 / 2) of each member q that shares more than two thirds of it with R(p, k1); weights are
    exp(-distance), distances divided by the row's largest; each vector is then the mean over the image's
    ``k2`` nearest, itself counted among them. The rows' largest distances (N,) are returned with them.
    """
    nearest, largest = find_neighbours(features, max(k1 + 1, k2))
    whole = _find_reciprocal(nearest[:, : k1 + 1])
    half = _find_reciprocal(nearest[:, : round(k1 / 2) + 1])
    shared = whole.multiply(whole @ half.T).tocoo()
    sizes = np.asarray(half.sum(axis=1)).ravel()
    joins = 3 * shared.data > 2 * sizes[shared.col]  # whole numbers, so exact
    added = sparse.csr_matrix((shared.data[joins], (shared.row[joins], shared.col[joins])), shape=whole.shape)
    expanded = (whole + added @ half).tocoo()
    weights = np.empty(expanded.nnz)
    for start in range(0, expanded.nnz, PAIRS_PER_CHUNK):
        part = slice(start, start + PAIRS_PER_CHUNK)
        cosines = np.einsum("ij,ij->i", features[expanded.row[part]], features[expanded.col[part]])
        weights[part] = np.exp(-(2.0 - 2.0 * cosines) / largest[expanded.row[part]])
    weights /= np.bincount(expanded.row, weights, len(features))[expanded.row]
    vectors = sparse.csr_matrix((weights, (expanded.row, expanded.col)), shape=whole.shape)
    mean = _mark(nearest[:, :k2])
    return (mean @ vectors / mean[0].nnz).tocsr(), largest


def iterate_jaccard_distances(vectors: Any, queries: int) -> Iterator[FloatArray]:
    """Yield the Jaccard distances (N - queries,) of each query to the gallery, in [0, 1].

    Args:
        vectors: those of ``encode`` for the queries, then the gallery, (N, N).
        queries: how many of the rows are queries.
    """
    columns = vectors[queries:].tocsc()
    total = columns.shape[0]
    for query in range(queries):
        row = vectors[query]
        touched = columns[:, row.indices]
        least = np.minimum(touched.data, np.repeat(row.data, np.diff(touched.indptr)))
        shared = np.bincount(touched.indices, least, total)
        yield 1.0 - shared / (2.0 - shared)  # rows sum to 1, so the maxima sum to 2 less the minima

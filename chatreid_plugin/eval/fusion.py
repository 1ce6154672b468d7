"""Fuse the model's scores with the baseline's similarities; after the store, so that changing it needs no model.

``k_reciprocal`` compares two images' neighbours: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal
Encoding", CVPR 2017, as their released code computes it, with neighbours sought among queries and gallery together.
Everything is sparse: of N images only the ``k1`` or ``k2`` nearest neighbours of each are kept, never the N x N
distances.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import expit
from scipy.stats import rankdata
from tqdm import tqdm

from ..archives import FloatArray, IntArray, ScoreArray
from ..datasets.benchmark import Query
from ..errors import ConfigError
from .backends.base import Confidence
from .candidates import Plan
from .filter import iterate_similarities
from .questions import list_pair_tasks, standardise
from .settings import ScoringSettings


RANK_OFFSET = 60  # Cormack et al., "Reciprocal Rank Fusion outperforms Condorcet...", SIGIR 2009
ROWS_PER_CHUNK = 256
PAIRS_PER_CHUNK = 8192
SMALLEST_DISTANCE = 1e-6  # squared; below it float32 features are one point, and the quotient of two such is noise


def fuse_scores(
    scoring: ScoringSettings, plan: Plan, scores: Sequence[Sequence[ScoreArray]], confidence: Confidence
) -> list[list[ScoreArray]]:
    """Return the scores of each query's candidates, fused with the baseline as ``scoring.fusion`` says.

    ``linear``: (1 - w) * baseline + w * model, each standardised over the query's candidates, w = ``fusion_weight``.
    ``reciprocal_rank``: 1 / (60 + rank) by the model plus the same by the baseline; tied candidates share their mean
    rank. ``k_reciprocal``: see ``_fuse_by_neighbours``. Only candidates move; the filter's tail stays behind them.
    Each trial is fused as if there were no other.

    Args:
        scoring: the evaluation's section.
        plan: the candidates, and the features of the baseline.
        scores: for each trial (K,) for each query, as ``plan.trial_candidates``.
        confidence: what they are.
    """
    if scoring.fusion == "none":
        return [list(values) for values in scores]
    if plan.features is None:
        raise ConfigError(f"scoring.fusion: {scoring.fusion} needs the features of a filter; filter.source is none.")
    queries, gallery = plan.features
    fused: list[list[ScoreArray]] = []
    for places, candidates, values in zip(plan.benchmark.trial_galleries, plan.trial_candidates, scores, strict=True):
        inside = [np.searchsorted(places, chosen) for chosen in candidates] if plan.benchmark.trials else candidates
        own = queries, gallery[places] if plan.benchmark.trials else gallery
        if scoring.fusion == "k_reciprocal":
            fused.append(list(_fuse_by_neighbours(scoring, plan.benchmark.queries, own, inside, values, confidence)))
        else:
            pairs = zip(values, inside, iterate_similarities(*own), strict=True)
            fused.append([_fuse_pair(scoring, one, row[chosen]) for one, chosen, row in pairs])
    return fused


def _fuse_pair(scoring: ScoringSettings, model: ScoreArray, baseline: ScoreArray) -> ScoreArray:
    """Return the scores (K,) of one query's candidates."""
    if not len(model):
        return model
    if scoring.fusion == "linear":
        weight = scoring.fusion_weight
        fused = (1.0 - weight) * standardise(baseline) + weight * standardise(model)
    else:
        fused = 1.0 / (RANK_OFFSET + rankdata(-model)) + 1.0 / (RANK_OFFSET + rankdata(-baseline))
    return fused.astype(np.float32)


def estimate_mismatch(
    scores: ScoreArray, scoring: ScoringSettings, confidence: Confidence, questions: int = 1
) -> FloatArray:
    """Return P(No) of each candidate (K,), from margins; other scores are scaled to [0, 1] over the candidates.

    ``questions``: how many yes/no questions a pair's score comes from, two where a query has an image and words.
    """
    values = scores.astype(np.float64)
    # Two margins are summed after standardising and choices are relative, so neither is a log-odds of Yes.
    asks_pairs = scoring.asks_model and scoring.mode == "pointwise"
    if asks_pairs and confidence == "margins" and questions == 1:
        return expit(-values)
    spread = float(np.ptp(values))
    return (values.max() - values) / spread if spread > 0 else np.full(len(values), 0.5)


def _fuse_by_neighbours(
    scoring: ScoringSettings,
    queries: Sequence[Query],
    sides: tuple[ScoreArray, ScoreArray],
    kept: Sequence[IntArray],
    scores: Sequence[ScoreArray],
    confidence: Confidence,
) -> Iterator[ScoreArray]:
    """Yield -((1 - lambda) * Jaccard + lambda * distance), (K,) for each query (Zhong et al. 2017).

    The distance is (1 - w) * baseline + w * P(No), both in [0, 1], after MUSE (arXiv 2606.16161); with
    ``backend: features`` it is the baseline's alone, which is plain k-reciprocal re-ranking.
    """
    share = 0.0 if scoring.backend == "features" else scoring.fusion_weight
    vectors, largest = encode(np.concatenate(sides), scoring.k1, scoring.k2)
    jaccard = iterate_jaccard_distances(vectors, len(queries))
    for query, values, candidates, similarities, row, scale in zip(
        queries, scores, kept, iterate_similarities(*sides), jaccard, largest[: len(queries)], strict=True
    ):
        if not len(candidates):
            yield values
            continue
        # Squared distances over the query's largest to any image, other queries included: the authors' code does so.
        distances = (2.0 - 2.0 * similarities[candidates].astype(np.float64)) / scale
        if share:
            mismatch = estimate_mismatch(
                values, scoring, confidence, len(list_pair_tasks(query, scoring.text_weight is not None))
            )
            distances = (1.0 - share) * distances + share * mismatch
        fused = (1.0 - scoring.lambda_value) * row[candidates] + scoring.lambda_value * distances
        yield (-fused).astype(np.float32)


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

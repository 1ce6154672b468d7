"""Fuse the model's scores with the baseline's similarities; after the store, so that changing it needs no model."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata

from ..errors import ConfigError
from ..eval_settings import EvalSettings
from .backends import Confidence
from .filtering import iterate_similarities
from .k_reciprocal import encode, iterate_jaccard_distances
from .modes import standardise
from .plan import Plan
from .prompts import list_pair_tasks
from .ties import FloatArray, IntArray, ScoreArray


RANK_OFFSET = 60  # Cormack et al., "Reciprocal Rank Fusion outperforms Condorcet...", SIGIR 2009


def fuse_scores(
    settings: EvalSettings, plan: Plan, scores: Sequence[ScoreArray], confidence: Confidence
) -> list[ScoreArray]:
    """Return the scores of each query's candidates, fused with the baseline as ``settings.fusion`` says.

    ``linear``: (1 - w) * baseline + w * model, each standardised over the query's candidates, w = ``fusion_weight``.
    ``reciprocal_rank``: 1 / (60 + rank) by the model plus the same by the baseline; tied candidates share their mean
    rank. ``k_reciprocal``: see ``_fuse_by_neighbours``. Only candidates move; the filter's tail stays behind them.

    Args:
        settings: the evaluation.
        plan: the candidates, and the features of the baseline.
        scores: (K,) for each query.
        confidence: what they are.
    """
    if settings.fusion == "none":
        return list(scores)
    if plan.query_features is None or plan.gallery_features is None:
        raise ConfigError(f"fusion: {settings.fusion} needs the features of a filter; filter is none.")
    baseline = iterate_similarities(plan.query_features, plan.gallery_features)
    if settings.fusion == "k_reciprocal":
        features = np.concatenate([plan.query_features, plan.gallery_features])
        rows = iterate_jaccard_distances(encode(features, settings.k1, settings.k2), len(plan.query_features))
        return list(_fuse_by_neighbours(settings, plan, scores, confidence, baseline, rows))
    return [
        _fuse_pair(settings, values, similarities[kept]) if len(kept) else values
        for values, kept, similarities in zip(scores, plan.kept, baseline, strict=True)
    ]


def _fuse_pair(settings: EvalSettings, model: ScoreArray, baseline: ScoreArray) -> ScoreArray:
    if settings.fusion == "linear":
        weight = settings.fusion_weight
        fused = (1.0 - weight) * standardise(baseline) + weight * standardise(model)
    else:
        fused = 1.0 / (RANK_OFFSET + rankdata(-model)) + 1.0 / (RANK_OFFSET + rankdata(-baseline))
    return fused.astype(np.float32)


def estimate_mismatch(
    scores: ScoreArray, settings: EvalSettings, confidence: Confidence, questions: int = 1
) -> FloatArray:
    """Return P(No) of each candidate (K,), from margins; other scores are scaled to [0, 1] over the candidates.

    ``questions``: how many yes/no questions a pair's score comes from, two where a query has an image and words.
    """
    values = scores.astype(np.float64)
    # Two margins are summed after standardising and choices are relative, so neither is a log-odds of Yes.
    asks_pairs = settings.backend in ("transformers", "http") and settings.mode == "pointwise"
    if asks_pairs and confidence == "margins" and questions == 1:
        return expit(-values)
    spread = float(np.ptp(values))
    return (values.max() - values) / spread if spread > 0 else np.full(len(values), 0.5)


def _fuse_by_neighbours(
    settings: EvalSettings,
    plan: Plan,
    scores: Sequence[ScoreArray],
    confidence: Confidence,
    baseline: Iterator[ScoreArray],
    jaccard: Iterator[FloatArray],
) -> Iterator[ScoreArray]:
    """Yield -((1 - lambda) * Jaccard + lambda * distance), (K,) for each query (Zhong et al. 2017).

    The distance is (1 - w) * baseline + w * P(No), both in [0, 1], after MUSE (arXiv 2606.16161); with
    ``backend: features`` it is the baseline's alone, which is plain k-reciprocal re-ranking.
    """
    share = 0.0 if settings.backend == "features" else settings.fusion_weight
    for query, values, kept, similarities, row in zip(
        plan.protocol.queries, scores, plan.kept, baseline, jaccard, strict=True
    ):
        if not len(kept):
            yield values
            continue
        distances = _normalise_distances(similarities, kept)
        if share:
            mismatch = estimate_mismatch(values, settings, confidence, len(list_pair_tasks(query)))
            distances = (1.0 - share) * distances + share * mismatch
        fused = (1.0 - settings.lambda_value) * row[kept] + settings.lambda_value * distances
        yield (-fused).astype(np.float32)


def _normalise_distances(similarities: ScoreArray, kept: IntArray) -> FloatArray:
    """Return the candidates' squared distances over the largest to any gallery image, in [0, 1]."""
    distances = 1.0 - similarities.astype(np.float64)
    return distances[kept] / max(float(distances.max()), 1e-12)

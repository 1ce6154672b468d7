"""Fuse the model's scores with the baseline's similarities; after the store, so that changing it needs no model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata

from ..errors import ConfigError
from ..eval_settings import EvalSettings
from .arrays import FloatArray, IntArray, ScoreArray
from .backends import Confidence
from .filtering import iterate_similarities
from .k_reciprocal import encode, iterate_jaccard_distances
from .modes import standardise
from .plan import Plan
from .prompts import list_pair_tasks
from .queries import Query


RANK_OFFSET = 60  # Cormack et al., "Reciprocal Rank Fusion outperforms Condorcet...", SIGIR 2009


@dataclass(frozen=True, slots=True)
class _Trial:
    """What one trial ranks; ``candidates`` are places in the trial's own gallery, whose features (G, D) these are."""

    queries: Sequence[Query]
    query_features: ScoreArray
    gallery_features: ScoreArray
    candidates: Sequence[IntArray]


def fuse_scores(
    settings: EvalSettings, plan: Plan, scores: Sequence[Sequence[ScoreArray]], confidence: Confidence
) -> list[list[ScoreArray]]:
    """Return the scores of each query's candidates, fused with the baseline as ``settings.fusion`` says.

    ``linear``: (1 - w) * baseline + w * model, each standardised over the query's candidates, w = ``fusion_weight``.
    ``reciprocal_rank``: 1 / (60 + rank) by the model plus the same by the baseline; tied candidates share their mean
    rank. ``k_reciprocal``: see ``_fuse_by_neighbours``. Only candidates move; the filter's tail stays behind them.
    Each trial is fused as if there were no other.

    Args:
        settings: the evaluation.
        plan: the candidates, and the features of the baseline.
        scores: for each trial (K,) for each query, as ``plan.trial_candidates``.
        confidence: what they are.
    """
    if settings.fusion == "none":
        return [list(values) for values in scores]
    fuse = _fuse_by_neighbours if settings.fusion == "k_reciprocal" else _fuse_pairs
    trials = zip(_iterate_trials(settings, plan), scores, strict=True)
    return [list(fuse(settings, trial, values, confidence)) for trial, values in trials]


def _iterate_trials(settings: EvalSettings, plan: Plan) -> Iterator[_Trial]:
    queries, features = plan.protocol.queries, plan.gallery_features
    if plan.query_features is None or features is None:
        raise ConfigError(f"fusion: {settings.fusion} needs the features of a filter; filter is none.")
    if not plan.protocol.trials:
        yield _Trial(queries, plan.query_features, features, plan.trial_candidates[0])
        return
    for places, candidates in zip(plan.protocol.trials, plan.trial_candidates, strict=True):
        inside = [np.searchsorted(places, chosen) for chosen in candidates]
        yield _Trial(queries, plan.query_features, features[places], inside)


def _fuse_pairs(
    settings: EvalSettings, trial: _Trial, scores: Sequence[ScoreArray], confidence: Confidence
) -> Iterator[ScoreArray]:
    baseline = iterate_similarities(trial.query_features, trial.gallery_features)
    for values, candidates, similarities in zip(scores, trial.candidates, baseline, strict=True):
        yield _fuse_pair(settings, values, similarities[candidates]) if len(candidates) else values


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
    asks_pairs = settings.asks_model and settings.mode == "pointwise"
    if asks_pairs and confidence == "margins" and questions == 1:
        return expit(-values)
    spread = float(np.ptp(values))
    return (values.max() - values) / spread if spread > 0 else np.full(len(values), 0.5)


def _fuse_by_neighbours(
    settings: EvalSettings, trial: _Trial, scores: Sequence[ScoreArray], confidence: Confidence
) -> Iterator[ScoreArray]:
    """Yield -((1 - lambda) * Jaccard + lambda * distance), (K,) for each query (Zhong et al. 2017).

    The distance is (1 - w) * baseline + w * P(No), both in [0, 1], after MUSE (arXiv 2606.16161); with
    ``backend: features`` it is the baseline's alone, which is plain k-reciprocal re-ranking.
    """
    share = 0.0 if settings.backend == "features" else settings.fusion_weight
    count = len(trial.query_features)
    features = np.concatenate([trial.query_features, trial.gallery_features])
    vectors, largest = encode(features, settings.k1, settings.k2)
    baseline = iterate_similarities(trial.query_features, trial.gallery_features)
    jaccard = iterate_jaccard_distances(vectors, count)
    for query, values, candidates, similarities, row, scale in zip(
        trial.queries, scores, trial.candidates, baseline, jaccard, largest[:count], strict=True
    ):
        if not len(candidates):
            yield values
            continue
        # Squared distances over the query's largest to any image, other queries included: the authors' code does so.
        distances = (2.0 - 2.0 * similarities[candidates].astype(np.float64)) / scale
        if share:
            mismatch = estimate_mismatch(
                values, settings, confidence, len(list_pair_tasks(query, settings.text_weight is not None))
            )
            distances = (1.0 - share) * distances + share * mismatch
        fused = (1.0 - settings.lambda_value) * row[candidates] + settings.lambda_value * distances
        yield (-fused).astype(np.float32)

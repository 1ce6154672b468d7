"""Scorers that need no model: the baseline's own features, and chance and perfection as bounds of every metric."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ...records import ImageRecord


ScoreArray = npt.NDArray[np.float32]


def score_random(query: ImageRecord, candidates: Sequence[ImageRecord], seed: int = 0) -> ScoreArray:
    """Return uniform scores (K,) that depend on the query, the seed and K alone: the lower bound."""
    generator = np.random.default_rng([seed, zlib.crc32(query.image_id.encode())])
    return generator.random(len(candidates), dtype=np.float32)


def score_oracle(query: ImageRecord, candidates: Sequence[ImageRecord]) -> ScoreArray:
    """Return 1 for the query's own identity and 0 else, (K,): the upper bound."""
    return np.array([record.person_id == query.person_id for record in candidates], dtype=np.float32)


def score_features(
    query: ImageRecord, candidates: Sequence[ImageRecord], features: Mapping[str, npt.NDArray[np.float32]]
) -> ScoreArray:
    """Return the cosine similarity of the filter's features, (K,): the baseline alone.

    Args:
        query: the query.
        candidates: K gallery images.
        features: image id to L2-normalised vector (D,).
    """
    if not candidates:
        return np.empty(0, dtype=np.float32)
    return np.stack([features[record.image_id] for record in candidates]) @ features[query.image_id]

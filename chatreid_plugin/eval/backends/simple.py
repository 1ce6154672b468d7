"""Scorers that need no model: the baseline's own features, and chance and perfection as bounds of every metric."""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xxhash

from ...datasets.benchmark import Query
from ...records import ImageRecord
from ..arrays import ScoreArray
from ..filtering import number_distinct


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

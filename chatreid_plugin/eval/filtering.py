"""The baseline filter: which gallery images are worth the model's time, and in what order the rest follows.

Second step of an evaluation (paper section 4.1): features of a simple baseline (``features``), cosine similarity, a
threshold ``tau``, a cap ``top_k`` and a floor. Where the filter loses a match no re-ranker can win it back, so recall
and ceiling are reported.

Where images of equal similarity stand on both sides of the cut of ``top_k`` or ``floor``, the first ones in the
gallery's order are kept. What the model is asked about, and so the result, then depends on that order, unlike all that
``metrics`` does with ties. It takes duplicate images or coarse features; the report says how often it happened.
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from .arrays import BoolArray, IntArray, ScoreArray
from .matches import IgnoreMask


SIMILARITY_CHUNK = 64


def number_distinct(features: Iterable[ScoreArray]) -> IntArray:
    """Return for each of N vectors (D,) the index of the first one that equals it, (N,)."""
    firsts: dict[bytes, int] = {}
    # Added to zero, so that -0.0 and 0.0 are the same bytes.
    keys = (hashlib.blake2b((vector + 0.0).tobytes(), digest_size=16).digest() for vector in features)
    return np.array([firsts.setdefault(key, place) for place, key in enumerate(keys)], dtype=np.int64)


def iterate_similarities(query_features: ScoreArray, gallery_features: ScoreArray) -> Iterator[ScoreArray]:
    """Yield for each query its cosine similarity to the gallery, (G,); a chunk of queries in memory at a time.

    Equal gallery rows are multiplied once: a matrix product may differ in the last digit from column to column, which
    would make an order of what is tied.
    """
    firsts, places = np.unique(number_distinct(gallery_features), return_inverse=True)
    repeats = len(firsts) < len(gallery_features)
    distinct = gallery_features[firsts] if repeats else gallery_features
    for start in range(0, len(query_features), SIMILARITY_CHUNK):
        similarities = query_features[start : start + SIMILARITY_CHUNK] @ distinct.T
        yield from similarities[:, places] if repeats else similarities


def filter_gallery(
    query_features: ScoreArray,
    gallery_features: ScoreArray,
    find_ignored: IgnoreMask,
    tau: float,
    top_k: int | None,
    floor: int,
) -> list[IntArray]:
    """Return for each query the gallery indices to score, most similar first; equal similarities in gallery order.

    Kept is every image of similarity ``tau`` or more, but no fewer than the ``floor`` best and no more than the
    ``top_k`` best (the cap wins, as it bounds the cost). Ignored images are removed first.

    Args:
        query_features: (Q, D) L2-normalised.
        gallery_features: (G, D) L2-normalised.
        find_ignored: query index -> boolean mask (G,).
        tau: cosine similarity; -1 or less keeps all.
        top_k: at most this many; None: no cap.
        floor: at least this many, as far as the gallery has them.
    """
    kept: list[IntArray] = []
    for query, similarities in enumerate(iterate_similarities(query_features, gallery_features)):
        allowed = np.flatnonzero(~find_ignored(query))
        # In float32 opposite vectors may have a similarity just below -1.
        similar = len(allowed) if tau <= -1 else int(np.count_nonzero(similarities[allowed] >= tau))
        count = max(similar, floor)
        kept.append(_take_best(allowed, similarities[allowed], count if top_k is None else min(count, top_k)))
    return kept


def is_cut_through_ties(similarities: ScoreArray, kept: IntArray, ignored: BoolArray) -> bool:
    """Return whether the filter left out an image (of G) that is as similar as one it kept."""
    if not len(kept):
        return False
    left_out = ~ignored
    left_out[kept] = False
    return bool((similarities[left_out] == similarities[kept].min()).any())


def _take_best(indices: IntArray, similarities: ScoreArray, count: int) -> IntArray:
    """Return the ``count`` indices of largest similarity, largest first, equal ones in the order given.

    Only what is taken is sorted: of equal similarities at the border the first ones are in.
    """
    if 0 < count < len(indices):
        border = np.partition(similarities, -count)[-count]
        above, tied = np.flatnonzero(similarities > border), np.flatnonzero(similarities == border)
        chosen = np.sort(np.concatenate([above, tied[: count - len(above)]]))
        indices, similarities = indices[chosen], similarities[chosen]
    return indices[np.argsort(-similarities, kind="stable")][:count]

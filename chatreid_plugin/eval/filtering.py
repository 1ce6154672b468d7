"""The baseline filter: which gallery images are worth the model's time, and in what order the rest follows.

Second step of an evaluation (paper section 4.1): features of a simple baseline (``features``), cosine similarity, a
threshold ``tau``, a cap ``top_k`` and a floor. Where the filter loses a match no re-ranker can win it back, so recall
and ceiling are reported.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .matches import IgnoreMask
from .ties import IntArray


FloatArray = npt.NDArray[np.float32]

SIMILARITY_CHUNK = 64


def iterate_similarities(query_features: FloatArray, gallery_features: FloatArray) -> Iterator[FloatArray]:
    """Yield for each query its cosine similarity to the gallery, (G,); a chunk of queries in memory at a time."""
    for start in range(0, len(query_features), SIMILARITY_CHUNK):
        yield from query_features[start : start + SIMILARITY_CHUNK] @ gallery_features.T


def filter_gallery(
    query_features: FloatArray,
    gallery_features: FloatArray,
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
        tau: cosine similarity; -1 keeps all.
        top_k: at most this many; None: no cap.
        floor: at least this many, as far as the gallery has them.
    """
    kept: list[IntArray] = []
    for query, similarities in enumerate(iterate_similarities(query_features, gallery_features)):
        allowed = np.flatnonzero(~find_ignored(query))
        count = max(int(np.count_nonzero(similarities[allowed] >= tau)), floor)
        kept.append(_take_best(allowed, similarities[allowed], count if top_k is None else min(count, top_k)))
    return kept


def _take_best(indices: IntArray, similarities: FloatArray, count: int) -> IntArray:
    """Return the ``count`` indices of largest similarity, largest first, equal ones in the order given.

    Only what is taken is sorted: of equal similarities at the border the first ones are in.
    """
    if 0 < count < len(indices):
        border = np.partition(similarities, -count)[-count]
        above, tied = np.flatnonzero(similarities > border), np.flatnonzero(similarities == border)
        chosen = np.sort(np.concatenate([above, tied[: count - len(above)]]))
        indices, similarities = indices[chosen], similarities[chosen]
    return indices[np.argsort(-similarities, kind="stable")][:count]

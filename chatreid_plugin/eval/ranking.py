"""One ranking out of two: the images the model scored, then those the filter left out; between scoring and metrics.

Two readings of the tail are in use, and both are reported. Default: the tail follows the candidates in baseline order,
so every match has a rank. Strict: the tail is not retrieved, so a match in it is never found: it adds nothing to the
average precision (still divided by all matches), is a miss in the CMC and makes INP 0.
"""

import numpy as np
import numpy.typing as npt

from .arrays import BoolArray, FloatArray, IntArray, ScoreArray


def merge_scores(kept: IntArray, scores: ScoreArray, similarities: ScoreArray | None, size: int) -> FloatArray:
    """Return one row of comparable scores (size,): candidates as scored, everything else below them by similarity.

    Candidates are numbered upwards from above the highest similarity, equal scores alike; so ties are neither made nor
    lost, inside the candidates or inside the tail, and the tail needs no sorting.

    Args:
        kept: (K,) gallery indices of the candidates.
        scores: (K,) their scores.
        similarities: (G,) baseline similarities of the whole gallery, or None: then the tail is tied.
        size: G.
    """
    if similarities is None:
        lowest = np.float64(scores.min()) if len(scores) else np.float64(0.0)
        row = np.full(size, np.nextafter(lowest, -np.inf))
        row[kept] = scores
        return row
    row = similarities.astype(np.float64)
    if len(kept):
        places = np.unique(scores, return_inverse=True)[1]
        row[kept] = float(similarities.max()) + 1.0 + places
    return row


def order_gallery(
    kept: IntArray, scores: npt.NDArray[np.floating], similarities: ScoreArray | None, left_out: BoolArray
) -> IntArray:
    """Return the gallery indices in ranking order without those left out; equal scores in the order given."""
    candidates = kept[np.argsort(-scores, kind="stable")]
    gone = left_out.copy()
    gone[kept] = True
    tail = np.flatnonzero(~gone)
    if similarities is None:
        return np.concatenate([candidates, tail])
    return np.concatenate([candidates, tail[np.argsort(-similarities[tail], kind="stable")]])

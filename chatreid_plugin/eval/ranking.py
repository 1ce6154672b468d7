"""One ranking out of two: the images the model scored, then those the filter left out; between scoring and metrics.

Two readings of the tail are in use, and both are reported. Default: the tail follows the candidates in baseline order,
so every match has a rank. Strict: the tail is not retrieved, so a match in it is never found: it adds nothing to the
average precision (still divided by all matches), is a miss in the CMC and makes INP 0.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from .protocols import BoolArray, Labels
from .ties import FloatArray, IntArray


ScoreArray = npt.NDArray[np.float32]


def merge_scores(kept: IntArray, scores: ScoreArray, similarities: ScoreArray) -> FloatArray:
    """Return one row of comparable scores (G,): candidates as scored, everything else below them by similarity.

    The tail is numbered downwards from the lowest candidate score, equal similarities alike; so ties are neither made
    nor lost, inside the candidates or inside the tail.

    Args:
        kept: (K,) gallery indices of the candidates.
        scores: (K,) their scores.
        similarities: (G,) baseline similarities of the whole gallery.
    """
    row = np.empty(len(similarities), dtype=np.float64)
    row[kept] = scores
    in_tail = np.ones(len(similarities), dtype=np.bool_)
    in_tail[kept] = False
    tail = np.flatnonzero(in_tail)
    if not len(tail):
        return row
    base = float(scores.min()) if len(scores) else 0.0
    step = max(1.0, 2.0 * float(np.spacing(abs(base))))  # a large score must not swallow the steps below it
    order = tail[np.argsort(-similarities[tail])]
    places = np.cumsum(np.concatenate([[1], np.diff(similarities[order]) != 0]))
    row[order] = base - places * step
    return row


def iterate_rows(
    kept: Sequence[IntArray], scores: Sequence[ScoreArray], similarities: Iterable[ScoreArray]
) -> Iterator[FloatArray]:
    """Yield the merged row (G,) of each query, for ``evaluate_ranking``."""
    for indices, values, row in zip(kept, scores, similarities, strict=True):
        yield merge_scores(indices, values, row)


def order_gallery(kept: IntArray, scores: ScoreArray, similarities: ScoreArray, ignored: BoolArray) -> IntArray:
    """Return the gallery indices in ranking order, ignored ones left out; equal scores in baseline order."""
    candidates = kept[np.argsort(-scores, kind="stable")]
    left_out = ignored.copy()
    left_out[kept] = True
    tail = np.flatnonzero(~left_out)
    return np.concatenate([candidates, tail[np.argsort(-similarities[tail], kind="stable")]])


def score_perfectly(kept: Sequence[IntArray], labels: Labels) -> list[ScoreArray]:
    """Return the scores of a perfect re-ranker, 1 for a match and 0 else: they give the filter's ceiling."""
    return [labels.find_positives(query)[indices].astype(np.float32) for query, indices in enumerate(kept)]


def measure_recall(kept: Sequence[IntArray], labels: Labels) -> float:
    """Return the mean over queries of the share of a query's matches that the filter kept (recall@K)."""
    shares: list[float] = []
    for query, indices in enumerate(kept):
        positives = labels.find_positives(query)
        shares.append(np.count_nonzero(positives[indices]) / np.count_nonzero(positives))
    return float(np.mean(shares))

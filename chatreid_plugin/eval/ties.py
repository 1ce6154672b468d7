"""The metrics of one query from the places of its positives, with equal scores treated exactly; used by ``metrics``.

Definitions (n positives at 0-based ranks p_1 < ... < p_n once ignored items are removed):
average precision = (1/n) sum i / (p_i + 1); trapezoid = (1/n) sum (i / (p_i + 1) + (i - 1) / p_i) / 2, the second term
being 1 when p_i = 0 (official Market-1501 and CUHK03-NP code); CMC@k = 1 if p_1 < k; INP = n / (p_n + 1)
(Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", 2021).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..datasets.benchmark import AveragePrecision
from .arrays import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class QueryMetrics:
    """Average precision, CMC at each k and INP of one query; expectations where items are tied."""

    average_precision: float
    cmc: FloatArray
    inverse_negative_penalty: float


def _compute_precisions(ranks: IntArray, before: FloatArray, definition: AveragePrecision) -> FloatArray:
    """Return the precision at 0-based ranks that have ``before`` positives ahead of them (linear in ``before``)."""
    precisions = (before + 1.0) / (ranks + 1)
    if definition == "trapezoid":
        earlier = np.where(ranks > 0, before / np.maximum(ranks, 1), 1.0)
        precisions = (precisions + earlier) / 2.0
    return precisions


def measure_ranks(ranks: IntArray, topk: Sequence[int], definition: AveragePrecision, retrieved: int) -> QueryMetrics:
    """Return the metrics of positives at known 0-based ranks (n,), ascending.

    Ranks from ``retrieved`` on count as never found: they add nothing to the average precision (which is still divided
    by all n positives), miss in the CMC, and make INP 0.
    """
    count = len(ranks)
    precisions = _compute_precisions(ranks, np.arange(count, dtype=np.float64), definition)
    first, last = int(ranks[0]), int(ranks[-1])
    total = precisions.sum() if last < retrieved else precisions[ranks < retrieved].sum()
    return QueryMetrics(
        float(total) / count,
        np.array([float(first < min(k, retrieved)) for k in topk]),
        count / (last + 1) if last < retrieved else 0.0,
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """Items of equal score: ``size`` of them, ``positives`` of which match; what is ranked before the group."""

    size: int
    positives: int
    items_before: int
    positives_before: int


def _list_groups(negatives_above: IntArray, negatives_tied: IntArray) -> list[_Group]:
    """Group positives (best first) by their place among the negatives.

    Neighbours with the same numbers either have the same score or no negative between them; both may be one group.
    """
    count = len(negatives_above)
    changes = (np.diff(negatives_above) != 0) | (np.diff(negatives_tied) != 0)
    starts = [0, *(np.flatnonzero(changes) + 1).tolist(), count]
    groups: list[_Group] = []
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        positives = end - start
        size = positives + int(negatives_tied[start])
        groups.append(_Group(size, positives, int(negatives_above[start]) + start, start))
    return groups


def _expect_precision_sum(group: _Group, definition: AveragePrecision, retrieved: int) -> float:
    """Expected sum of the precisions at the group's positives over all orders of the group.

    A place holds a positive with probability m/t; given that, each earlier place of the group holds one of the other
    m-1 positives with probability (m-1)/(t-1). Precision is linear in the number before it, so the mean is exact.
    """
    places = np.arange(group.size, dtype=np.int64)
    rate = (group.positives - 1) / (group.size - 1) if group.size > 1 else 0.0
    ranks = group.items_before + places
    before = (group.positives_before + places * rate).astype(np.float64)
    precisions = _compute_precisions(ranks, before, definition)
    return float(precisions[ranks < retrieved].sum()) * group.positives / group.size


def _expect_hit(group: _Group, k: int) -> float:
    """Probability that a positive is among the first k items, ``group`` being the first with positives.

    One minus the hypergeometric chance of drawing no positive among the group's first k - items_before items.
    """
    drawn = min(max(k - group.items_before, 0), group.size)
    draws = np.arange(drawn)
    return 1.0 - float(np.prod(np.maximum(group.size - group.positives - draws, 0) / (group.size - draws)))


def _expect_inverse_negative_penalty(group: _Group, count: int, retrieved: int) -> float:
    """Expected n / (rank of the last positive), ``group`` being the last with positives.

    The last of m positives among t places is at place l with probability C(l-1, m-1) / C(t, m): m/t for l = t, and
    times (l-m+1)/l for each step down.
    """
    places = np.arange(group.size, group.positives - 1, -1, dtype=np.int64)
    steps = (places[1:] - group.positives + 1) / places[1:]
    probabilities = np.cumprod(np.concatenate([[group.positives / group.size], steps]))
    ranks = group.items_before + places
    return float((probabilities * count / ranks)[ranks <= retrieved].sum())


def expect_over_ties(
    negatives_above: IntArray,
    negatives_tied: IntArray,
    topk: Sequence[int],
    definition: AveragePrecision,
    retrieved: int,
) -> QueryMetrics:
    """Return the exact expectation of the metrics when every order of equally scored items is equally likely.

    Args:
        negatives_above: (n,) for each positive, best score first: how many negatives score higher.
        negatives_tied: (n,) how many negatives have the same score.
        topk: the CMC's k.
        definition: of the average precision.
        retrieved: as in ``measure_ranks``.
    """
    count = len(negatives_above)
    groups = _list_groups(negatives_above, negatives_tied)
    precision_sum = sum(_expect_precision_sum(group, definition, retrieved) for group in groups)
    return QueryMetrics(
        precision_sum / count,
        np.array([_expect_hit(groups[0], min(k, retrieved)) for k in topk]),
        _expect_inverse_negative_penalty(groups[-1], count, retrieved),
    )

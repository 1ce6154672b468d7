"""The metrics of one query from its positives' places, with equal scores treated exactly; used by ``metrics``.

Definitions (n positives at 0-based ranks p_1 < ... < p_n once ignored items are removed): average precision = (1/n)
sum i / (p_i + 1); trapezoid = (1/n) sum (i / (p_i + 1) + (i - 1) / p_i) / 2, the second term being 1 when p_i = 0
(official Market-1501 and CUHK03-NP code); CMC@k = 1 if p_1 < k; INP = n / (p_n + 1) (Ye et al., "Deep Learning for
Person Re-identification: A Survey and Outlook", 2021).

CMC over identities: ``unique_identity``: only the best-ranked image of each identity counts (SYSU-MM01's official
code, LLCM). ``single_gallery_shot``: exact expectation over drawing one kept image per identity (CUHK03 classic, where
torchreid averages ten random draws).

With ties ``expected`` every figure is the mean over all orders of the tied items: in closed form, and for CMC over
identities exactly up to 511 tied items, within 2e-5 beyond (``_draw_arrivals``; the tests shuffle and count).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..archives import FloatArray, IntArray
from ..datasets.benchmark import AveragePrecision, Cmc, Ties


# Points at which an average over arrivals is taken: exact for polynomials up to degree 511.
NODES = 256


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


@lru_cache(maxsize=NODES)
def _list_nodes(count: int) -> tuple[FloatArray, FloatArray]:
    """Return ``count`` Gauss-Legendre points on [0, 1] and their weights."""
    points, weights = np.polynomial.legendre.leggauss(count)
    return (points + 1) / 2, weights / 2


def _draw_arrivals(degree: int, racing: int) -> tuple[FloatArray, FloatArray]:
    """Return points in [0, 1] at which the first of ``racing`` tied images arrives, and their weights.

    A random order is that of independent uniform numbers, one an image: given the first racing image's number u, which
    has density racing * (1 - u) ** (racing - 1), each other image is ahead with chance u, independently. The chance of
    a hit is then a polynomial of ``degree`` in u, whose average Gauss-Legendre points give exactly. Of a larger degree
    the points are taken evenly in the quantiles of u instead: within 2e-5, measured up to 100,000 tied images.
    """
    if degree // 2 < NODES:
        points, weights = _list_nodes(degree // 2 + 1)
        return points, weights * racing * (1 - points) ** (racing - 1)
    quantiles, weights = _list_nodes(NODES)
    return -np.expm1(np.log1p(-quantiles) / racing), weights


def _expect_hits(chances: FloatArray, topk: Sequence[int]) -> FloatArray:
    """Return P(fewer than k identities ahead) for independent ``chances`` (identities, cases): (cases, len(topk))."""
    most = min(max(topk), len(chances) + 1)
    counts = np.zeros((most, chances.shape[1]))
    counts[0] = 1.0
    for identity in np.flatnonzero(chances.any(axis=1)):
        chance = chances[identity]
        moved = counts[:-1] * chance
        counts *= 1 - chance
        counts[1:] += moved
    below = np.cumsum(counts, axis=0)
    return np.stack([below[min(k, most) - 1] for k in topk], axis=1)


def _choose_positives(
    row: npt.NDArray[np.floating], positives: IntArray, cmc: Cmc, ties: Ties
) -> tuple[IntArray, IntArray]:
    """Return the positives to measure and how many each stands for: equal scores have equal chances."""
    if cmc == "unique_identity":
        # All tied best positives race together; in gallery order the first of them leads.
        best = positives[row[positives] == row[positives].max()]
        return best[:1], np.array([len(best)])
    if ties == "index":
        return positives, np.ones(len(positives), dtype=np.int64)
    _, first, counts = np.unique(row[positives], return_index=True, return_counts=True)
    return positives[first], counts


def _count_ahead(
    row: npt.NDArray[np.floating], codes: IntArray, places: IntArray, negatives: IntArray, ties: Ties
) -> tuple[IntArray, IntArray, IntArray]:
    """Return each identity's images above and tied with each positive, (identities, positives), and in all."""
    ordered = negatives[np.argsort(codes[negatives], kind="stable")]
    starts = np.flatnonzero(np.diff(codes[ordered], prepend=-1))
    if not len(starts):
        return np.zeros((0, len(places)), np.int64), np.zeros((0, len(places)), np.int64), starts
    scores = row[ordered][:, None]
    above = np.add.reduceat(scores > row[places], starts, axis=0, dtype=np.int64)
    tied = scores == row[places]
    if ties == "index":
        tied &= ordered[:, None] < places
    equal = np.add.reduceat(tied, starts, axis=0, dtype=np.int64)
    return above, equal, np.diff(starts, append=len(ordered))


def cuts_through_ties(
    row: npt.NDArray[np.floating], positives: IntArray, negatives: IntArray, cmc: Cmc, retrieved: int
) -> bool:
    """Return whether only some of the items scored like a positive that counts are among the ``retrieved`` first."""
    kept = row[np.concatenate([positives, negatives])]
    if not 0 < retrieved < len(kept):
        return False
    last, following = np.sort(kept)[::-1][retrieved - 1 : retrieved + 1]
    counting = row[positives].max() if cmc == "unique_identity" else row[positives]
    return bool(last == following and np.any(counting == last))


def measure_identities(
    row: npt.NDArray[np.floating],
    codes: IntArray,
    positives: IntArray,
    negatives: IntArray,
    cmc: Cmc,
    ties: Ties,
    topk: Sequence[int],
    retrieved: int,
) -> FloatArray:
    """Return the CMC of one query at each k.

    Args:
        row: (G,) scores.
        codes: (G,) identity of each gallery item as an integer from 0 on.
        positives: indices of the query's kept positives.
        negatives: indices of the kept negatives.
        cmc: ``unique_identity`` or ``single_gallery_shot``.
        ties: as in ``evaluate_ranking``.
        topk: the CMC's k.
        retrieved: a positive that has so many kept items above it was not returned, and is a miss. The cut must not be
            among equal scores (``cuts_through_ties``).
    """
    places, counts = _choose_positives(row, positives, cmc, ties)
    above, equal, sizes = _count_ahead(row, codes, places, negatives, ties)
    items_above = above.sum(axis=0) + np.count_nonzero(row[positives][:, None] > row[places], axis=0)
    returned = np.flatnonzero(items_above < retrieved)
    if not len(returned):
        return np.zeros(len(topk))
    if ties == "optimistic":
        equal[:] = 0
    elif ties != "expected":
        above, equal = above + equal, np.zeros_like(equal)
    unique = cmc == "unique_identity"
    degrees = equal.sum(axis=0) + counts - 1 if unique else np.count_nonzero(equal, axis=0)
    # Every arrival of every positive is one case, so that all are counted in one pass over the identities.
    drawn = [_draw_arrivals(int(degrees[at]), int(counts[at]) if unique else 1) for at in returned]
    cases = np.repeat(returned, [len(points) for points, _ in drawn])
    points, weights = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    if unique:
        chances = np.where(above[:, cases] > 0, 1.0, 1.0 - (1.0 - points) ** equal[:, cases])
    else:
        weights = weights * counts[cases] / len(positives)
        chances = (above[:, cases] + equal[:, cases] * points) / sizes[:, None]
    return weights @ _expect_hits(chances, topk)

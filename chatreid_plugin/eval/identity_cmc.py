"""CMC over gallery identities rather than images, with equal scores treated exactly; used by ``metrics``.

``unique_identity``: only the best-ranked image of each identity counts (SYSU-MM01's official code, LLCM).
``single_gallery_shot``: exact expectation over drawing one kept image per identity (CUHK03 classic, where torchreid
averages ten random draws): the number of other identities ahead of the query's is Poisson-binomial.

Random tie order is a random arrival time for each item, here exponential: an image has come by time t with chance
1 - exp(-t). Given the positive's time, identities are ahead of it independently; what is left is an integral over it.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..datasets.benchmark import Cmc, Ties
from .arrays import FloatArray, IntArray


# Up to here the integral is exact. The numerical rule beyond spans times from 1e-10 to 40 times the mean arrival time.
EXACT_NODES = 256
EARLIEST, LATEST = 1e-10, 40.0
LARGEST_STEP = 0.1


@lru_cache(maxsize=EXACT_NODES)
def _draw_nodes(count: int) -> tuple[FloatArray, FloatArray]:
    """Return ``count`` Gauss-Legendre nodes and weights on [0, 1]: exact for polynomials up to degree 2 count - 1."""
    points, weights = np.polynomial.legendre.leggauss(count)
    return (points + 1) / 2, weights / 2


def _draw_times(degree: int, racing: int, most: int) -> tuple[FloatArray, FloatArray]:
    """Return times at which the first of ``racing`` images arrives, and their weights.

    In u = 1 - exp(-t) the chance of a hit is a polynomial of ``degree``, which Gauss-Legendre integrates exactly. Of
    large degree it changes too fast for that, but smoothly in log t, over a width that depends on the largest k alone
    (``most``) and not on the number of images: there trapezoids are within 1e-9 (tested up to 100,000 tied images).
    """
    count = degree // 2 + 1
    if count <= EXACT_NODES:
        uniform, weights = _draw_nodes(count)
        return -np.log1p(-uniform), weights * racing * (1 - uniform) ** (racing - 1)
    times = np.exp(np.arange(np.log(EARLIEST), np.log(LATEST), min(LARGEST_STEP, most**-0.5)))
    weights = times * np.exp(-times)
    return times / racing, weights / weights.sum()


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
    # Every time of every positive is one case, so that all are counted in one pass over the identities.
    drawn = [_draw_times(int(degrees[at]), int(counts[at]) if unique else 1, max(topk)) for at in returned]
    cases = np.repeat(returned, [len(times) for times, _ in drawn])
    times, weights = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    if unique:
        chances = np.where(above[:, cases] > 0, 1.0, -np.expm1(-equal[:, cases] * times))
    else:
        weights = weights * counts[cases] / len(positives)
        chances = (above[:, cases] - equal[:, cases] * np.expm1(-times)) / sizes[:, None]
    return weights @ _expect_hits(chances, topk)

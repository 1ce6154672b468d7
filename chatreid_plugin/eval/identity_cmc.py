"""CMC over gallery identities rather than images, with equal scores treated exactly; used by ``metrics``.

``unique_identity``: only the best-ranked image of each identity counts (SYSU-MM01's official code, LLCM).
``single_gallery_shot``: exact expectation over drawing one kept image per identity (CUHK03 classic, where torchreid
averages ten random draws): the number of other identities ahead of the query's is Poisson-binomial.

Random tie order is a uniform arrival time for each item. Given the positive's time u, identities are ahead of it
independently, and the chance of a hit is a polynomial in u, which Gauss-Legendre integrates.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .ties import FloatArray, IntArray


Cmc = Literal["standard", "unique_identity", "single_gallery_shot"]
Ties = Literal["expected", "index", "optimistic", "pessimistic"]

MAX_NODES = 256


def _draw_nodes(degree: int) -> tuple[FloatArray, FloatArray]:
    """Return Gauss-Legendre nodes and weights on [0, 1], exact up to ``degree`` while 256 nodes are enough."""
    points, weights = np.polynomial.legendre.leggauss(min(degree // 2 + 1, MAX_NODES))
    return (points + 1) / 2, weights / 2


def _expect_hits(chances: FloatArray, topk: Sequence[int]) -> FloatArray:
    """Return P(fewer than k identities ahead) for independent ``chances`` (identities, cases): (cases, len(topk))."""
    most = min(max(topk), len(chances) + 1)
    counts = np.zeros((most, chances.shape[1]))
    counts[0] = 1.0
    for chance in chances[(chances > 0).any(axis=1)]:
        moved = counts[:-1] * chance
        counts *= 1 - chance
        counts[1:] += moved
    below = np.cumsum(counts, axis=0)
    return np.stack([below[min(k, most) - 1] if k > 0 else np.zeros(chances.shape[1]) for k in topk], axis=1)


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
        retrieved: a positive that has so many kept items above it was not returned, and is a miss.
    """
    _, identities = np.unique(codes[negatives], return_inverse=True)
    count = int(identities.max()) + 1 if len(identities) else 0
    sizes = np.bincount(identities, minlength=count)
    unique = cmc == "unique_identity"
    if unique:
        best = row[positives].max()
        places = positives[row[positives] == best]
        # All tied best positives race together; in gallery order the first of them leads.
        tied_positives, places = len(places), places[:1]
    else:
        tied_positives, places = 1, positives
    hits: list[Any] = []
    kept = np.concatenate([positives, negatives])
    for place in places.tolist():
        if np.count_nonzero(row[kept] > row[place]) >= retrieved:
            hits.append(np.zeros(len(topk)))
            continue
        above = np.bincount(identities[row[negatives] > row[place]], minlength=count)
        equal_items = row[negatives] == row[place]
        if ties == "index":
            equal_items &= negatives < place
        equal = np.bincount(identities[equal_items], minlength=count)
        if ties == "optimistic":
            equal[:] = 0
        elif ties != "expected":
            above, equal = above + equal, np.zeros_like(equal)
        degree = int(equal.sum()) + tied_positives - 1 if unique else int(np.count_nonzero(equal))
        times, weights = _draw_nodes(degree)
        if unique:
            weights = weights * tied_positives * (1 - times) ** (tied_positives - 1)
            chances = np.where(above[:, None] > 0, 1.0, 1 - (1 - times) ** equal[:, None])
        else:
            chances = (above[:, None] + equal[:, None] * times) / sizes[:, None]
        hits.append(weights @ _expect_hits(chances, topk))
    return np.mean(hits, axis=0)

"""mAP, CMC and mINP of a ranking, from one row of scores at a time: the last computation before the report.

Only the places of a query's positives matter, so its negatives are sorted by value once and each positive is looked up
among them; no argsort of the gallery and one row in memory. Ties follow a stated rule: peers leave them to an
unstable sort, which lets rank-1 of yes/no scores fall anywhere between 0 and 100 %.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from ..archives import FloatArray, IntArray
from ..datasets.benchmark import AveragePrecision, Cmc, Ties
from ..datasets.matching import Labels
from ..errors import ConfigError, DataError
from .inputs import Ignore, iterate_rows, read_matching, read_retrieved, read_row, read_topk
from .tied import QueryMetrics, cuts_through_ties, expect_over_ties, measure_identities, measure_ranks


FIRST_ITEMS = 500
EXAMPLES_SHOWN = 10
# Of the probe for scores that stand the wrong way round: queries, and standard errors.
PROBED = 200
DEVIATIONS = 3.0


@dataclass(frozen=True, slots=True)
class RankingMetrics:
    """The metrics of one ranking, as fractions between 0 and 1, averaged over the valid queries.

    Attributes:
        mean_ap: mean average precision.
        cmc: k to the share of queries with a positive among the first k.
        mean_inp: mean inverse negative penalty.
        valid_queries: number of queries with at least one positive left after the ignored items are removed; of
            several splits, those of all of them.
        invalid_queries: indices of the others; they are in no mean.
        tie_rate: share of valid queries in which a positive has the same score as a negative.
        average_precisions: (valid_queries,) average precision of each valid query.
        inverse_negative_penalties: (valid_queries,) the same of what ``mean_inp`` is the mean of.
        query_indices: (valid_queries,) which query each of them belongs to.
        interval: see ``bootstrap_interval``.
    """

    mean_ap: float
    cmc: dict[int, float]
    mean_inp: float
    valid_queries: int
    invalid_queries: tuple[int, ...]
    tie_rate: float
    average_precisions: FloatArray
    inverse_negative_penalties: FloatArray
    query_indices: IntArray
    interval: tuple[float, float]


# Values drawn at once: 8 MB.
BOOTSTRAP_CHUNK = 1 << 20


def bootstrap_interval(*splits: FloatArray, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """Return the 2.5 and 97.5 percentiles of the mean of values (n,) resampled with replacement.

    Of several splits each is resampled within itself, and the unweighted mean of their means is taken: as the figure
    that is quoted.
    """
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for one in splits:
        rows = max(1, BOOTSTRAP_CHUNK // len(one))
        for start in range(0, resamples, rows):
            drawn = generator.integers(0, len(one), (min(rows, resamples - start), len(one)))
            means[start : start + rows] += one[drawn].mean(axis=1) / len(splits)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _rank_by_index(
    row: npt.NDArray[np.floating], positives: IntArray, excluded: npt.NDArray[Any], negatives_above: IntArray
) -> IntArray:
    """Return the positives' 0-based ranks, ascending, when equal scores keep the gallery's order."""
    is_negative = np.ones(len(row), dtype=np.bool_)
    is_negative[excluded] = False
    ranks: list[int] = []
    for order, place in enumerate(positives[np.argsort(-row[positives], kind="stable")].tolist()):
        earlier = int(np.count_nonzero((row[:place] == row[place]) & is_negative[:place]))
        ranks.append(int(negatives_above[order]) + earlier + order)
    return np.array(ranks, dtype=np.int64)


def _measure_first_500(
    row: npt.NDArray[np.floating], positives: IntArray, excluded: npt.NDArray[Any], retrieved: int
) -> float:
    """Return the mean precision of the positives among the first 500 items, cut before ignored ones are removed.

    Positives from rank ``retrieved`` on add nothing, but count in the mean.
    """
    order = np.argsort(-row, kind="stable")[:FIRST_ITEMS]
    is_negative, is_positive = np.ones(len(row), dtype=np.bool_), np.zeros(len(row), dtype=np.bool_)
    is_negative[excluded] = False
    is_positive[positives] = True
    matches = is_positive[order][is_positive[order] | is_negative[order]]
    ranks = np.flatnonzero(matches)
    precisions = np.where(ranks < retrieved, np.arange(1, len(ranks) + 1) / (ranks + 1), 0.0)
    return float(np.mean(precisions)) if len(ranks) else 0.0


def _measure_row(
    row: npt.NDArray[np.floating],
    positives: IntArray,
    excluded: npt.NDArray[Any],
    ties: Ties,
    topk: Sequence[int],
    definition: AveragePrecision,
    retrieved: int,
) -> tuple[QueryMetrics, bool]:
    """Return the metrics of one query and whether a positive is tied with a negative."""
    values = np.sort(row[positives])[::-1]
    negatives = np.delete(row, excluded)
    # Negatives below the last positive change nothing: leaving them out saves most of the sorting.
    negatives = np.sort(negatives[negatives >= values[-1]])
    above = len(negatives) - np.searchsorted(negatives, values, side="right")
    tied = len(negatives) - np.searchsorted(negatives, values, side="left") - above
    has_ties = bool(tied.any())
    if has_ties and ties == "expected":
        return expect_over_ties(above, tied, topk, definition, retrieved), True
    if has_ties and ties == "index":
        ranks = _rank_by_index(row, positives, excluded, above)
    else:
        ranks = above + np.arange(len(positives)) + (tied if ties == "pessimistic" else 0)
    return measure_ranks(ranks, topk, definition, retrieved), has_ties


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}.")


def _summarise(
    found: Sequence[tuple[QueryMetrics, bool]], valid: Sequence[int], invalid: Sequence[int], topk: Sequence[int]
) -> RankingMetrics:
    average_precisions = np.array([metrics.average_precision for metrics, _ in found])
    penalties = np.array([metrics.inverse_negative_penalty for metrics, _ in found])
    cmc = np.mean([metrics.cmc for metrics, _ in found], axis=0)
    return RankingMetrics(
        mean_ap=float(average_precisions.mean()),
        cmc={k: float(value) for k, value in zip(topk, cmc, strict=True)},
        mean_inp=float(penalties.mean()),
        valid_queries=len(found),
        invalid_queries=tuple(invalid),
        tie_rate=float(np.mean([has_ties for _, has_ties in found])),
        average_precisions=average_precisions,
        inverse_negative_penalties=penalties,
        query_indices=np.array(valid, dtype=np.int64),
        interval=bootstrap_interval(average_precisions),
    )


class DirectionProbe:
    """Whether scores stand the wrong way round: average precisions of some queries, as scored and in reversed order.

    Higher is better everywhere here, while torchreid's and fast-reid's matrices are distances: ranked as they are,
    they give a low mAP and no error.
    """

    def __init__(self, queries: int) -> None:
        count = min(queries, PROBED)  # none: nothing is asked
        self.sample = {place * queries // count for place in range(count)}
        self.precisions: list[tuple[float, float]] = []

    def explain(self, remedy: str) -> str:
        """Say that the reversed order is far better, and the remedy; nothing if it is not.

        Far better is half as much again, and no chance: by three standard errors of the queries' differences, with
        room for a handful of queries.
        """
        if not self.precisions:
            return ""
        given, turned = np.array(self.precisions).T
        gains = turned - given
        chance = DEVIATIONS * float(gains.std()) / len(gains) ** 0.5 + 1.0 / len(gains)
        if gains.mean() <= chance or turned.mean() <= 1.5 * given.mean():
            return ""
        return (
            f"In reversed order these scores rank far better: mAP {100 * turned.mean():.1f} instead of "
            f"{100 * given.mean():.1f} over {len(gains)} queries. Higher has to be better: if they are distances, "
            f"{remedy}."
        )


class RankingMeter:
    """``evaluate_ranking``, row by row: for several rankings of the same queries in one pass.

    The options are those of ``evaluate_ranking``; its errors are raised by the same causes. With ``probe`` it looks
    whether the scores stand the wrong way round (``DirectionProbe``).
    """

    def __init__(
        self,
        labels: Labels,
        *,
        average_precision: AveragePrecision = "mean",
        cmc: Cmc = "standard",
        ties: Ties = "expected",
        topk: Iterable[int] = (1, 5, 10, 20),
        probe: bool = False,
    ) -> None:
        _check_choice("average_precision", average_precision, AveragePrecision)
        _check_choice("cmc", cmc, Cmc)
        _check_choice("ties", ties, Ties)
        if average_precision == "top500" and ties != "index":
            raise ConfigError(
                'average_precision="top500" cuts the list, so equal scores need one order: set ties="index", the '
                "gallery's order."
            )
        self.labels = labels
        self.query_count, self.gallery_size = len(labels.query_person), len(labels.gallery_person)
        self._definition: AveragePrecision = average_precision
        self._cmc: Cmc = cmc
        self._ties: Ties = ties
        self._topk = read_topk(topk)
        self.direction = DirectionProbe(self.query_count if probe else 0)
        self._found: list[tuple[QueryMetrics, bool]] = []
        self._valid: list[int] = []
        self._invalid: list[int] = []

    def add(self, query: int, row: Any, retrieved: int | None = None) -> QueryMetrics | None:
        """Measure the scores (G,) of one query and return its figures, None if nothing matches it.

        ``retrieved`` is as in ``evaluate_ranking``, for this query.
        """
        values = read_row(row, query, self.gallery_size)
        positives, excluded = self.labels.find(query)
        if not len(positives):
            self._invalid.append(query)
            return None
        limit = self.gallery_size if retrieved is None else retrieved
        metrics, has_ties = _measure_row(values, positives, excluded, self._ties, self._topk, self._definition, limit)
        if self._definition == "top500":
            precision = _measure_first_500(values, positives, excluded, limit)
            metrics = replace(metrics, average_precision=precision)
        if self._cmc != "standard":
            negatives = np.delete(np.arange(self.gallery_size), excluded)
            if cuts_through_ties(values, positives, negatives, self._cmc, limit):
                raise DataError(
                    f'Query {query}: retrieved={limit} cuts through equal scores, for which cmc="{self._cmc}" is not '
                    'defined. Cut between different scores, or use cmc="standard".'
                )
            codes, topk = self.labels.gallery_person, self._topk
            hits = measure_identities(values, codes, positives, negatives, self._cmc, self._ties, topk, limit)
            metrics = replace(metrics, cmc=hits)
        self._valid.append(query)
        self._found.append((metrics, has_ties))
        if query in self.direction.sample:
            ways = [
                _measure_row(way, positives, excluded, "expected", (1,), "mean", len(row)) for way in (values, -values)
            ]
            self.direction.precisions.append((ways[0][0].average_precision, ways[1][0].average_precision))
        return metrics

    def summarise(self) -> RankingMetrics:
        """Return the means over the valid queries, once every query was added."""
        rows = len(self._valid) + len(self._invalid)
        if rows != self.query_count:
            raise DataError(f"{rows} rows of scores for {self.query_count} queries.")
        if not self._valid:
            reasons = "; ".join(map(self.labels.explain_unmatched, self._invalid[:EXAMPLES_SHOWN]))
            raise DataError(f"None of {len(self._invalid)} queries has a match in the gallery: {reasons}.")
        return _summarise(self._found, self._valid, self._invalid, self._topk)


def evaluate_ranking(
    scores: npt.ArrayLike | Iterable[npt.ArrayLike],
    query_person: Any,
    gallery_person: Any,
    query_camera: Any = None,
    gallery_camera: Any = None,
    *,
    ignore: Ignore = None,
    average_precision: AveragePrecision = "mean",
    cmc: Cmc = "standard",
    ties: Ties = "expected",
    topk: Iterable[int] = (1, 5, 10, 20),
    retrieved: Sequence[int] | npt.NDArray[np.integer] | None = None,
) -> RankingMetrics:
    """Measure a ranking of Q queries over G gallery items.

    Warns where the reversed order ranks far better, as it does with distances.

    Args:
        scores: (Q, G) array or tensor, or Q rows of (G,) one after another; real numbers, higher is better; float32
            is used as it is.
        query_person: (Q,) identities: numbers, texts, tuples or whatever else has a hash and compares equal.
        gallery_person: (G,) identities; an identity that no query has (a distractor) is always a negative.
        query_camera: (Q,) cameras, for ``ignore="same_camera"``.
        gallery_camera: (G,) cameras.
        ignore: what is removed before ranking; has to be said where cameras are given. ``"nothing"``;
            ``"same_camera"``: items of the query's identity and camera (Zheng et al., "Scalable Person
            Re-identification: A Benchmark", 2015); or a function from a query's index to a boolean mask (G,) of
            ignored items. None: nothing, without cameras.
        average_precision: ``"mean"`` of precisions (the field's default); ``"trapezoid"`` (official Market-1501
            code), never higher: 0.1 to 4 points lower on the benchmarks' sizes, the more the fewer matches a query
            has, and half of a single match that is not first; or ``"top500"`` (Instruct-ReID's code): only the first
            500 items count, cut before ignored ones are removed; divided by the positives among them; needs
            ``ties="index"``.
        cmc: ``"standard"``: is a positive among the first k; ``"unique_identity"`` or ``"single_gallery_shot"``: the
            same over identities (see ``tied``). AP and INP stay over the full gallery.
        ties: for equal scores: ``"expected"``, the exact mean over all their orders; ``"index"``, in gallery order;
            ``"optimistic"``, positives first; ``"pessimistic"``, positives last.
        topk: the CMC's k, whole numbers from 1 on.
        retrieved: (Q,) how many items of each ranking were returned; positives after them count as never found
            (nothing in AP, a miss in CMC, INP 0). None: all. A ``cmc`` over identities needs a cut between
            different scores.

    Raises:
        ConfigError: an unknown option, cameras missing for ``"same_camera"`` or given without ``ignore``, or options
            that do not go together.
        DataError: scores that are NaN, infinite, masked or no real numbers, labels that cannot be compared, shapes
            that do not fit, or no query with a positive.
    """
    labels = read_matching(query_person, gallery_person, query_camera, gallery_camera, ignore)
    meter = RankingMeter(labels, average_precision=average_precision, cmc=cmc, ties=ties, topk=topk, probe=True)
    limits = None if retrieved is None else read_retrieved(retrieved, meter.query_count)
    for query, row in enumerate(iterate_rows(scores, meter.query_count, meter.gallery_size)):
        meter.add(query, row, None if limits is None else limits[query])
    metrics = meter.summarise()
    if doubt := meter.direction.explain("hand over -scores"):
        warnings.warn(doubt, stacklevel=2)
    return metrics

"""What an evaluation measures: every query's ranking of each trial's gallery, in one pass for metrics, files and page.

A ranking joins two: the images that have a score, then those the filter left out. Two readings of this tail are in
use, and both are reported. Default: the tail follows the candidates in baseline order, so every match has a rank.
Strict: the tail is not retrieved, so a match in it is never found: it adds nothing to the average precision (still
divided by all matches), is a miss in the CMC and makes INP 0.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..archives import BoolArray, FloatArray, IntArray, ScoreArray
from ..datasets.benchmark import Benchmark
from ..datasets.matching import Labels
from .backends.files import Matrix, check_row
from .candidates import Plan
from .filter import is_cut_through_ties
from .inputs import read_row
from .metrics import QueryMetrics, RankingMeter, RankingMetrics, bootstrap_interval


# The CMC is measured at each of these ranks, for its curve.
CURVE_RANKS = tuple(range(1, 51))
# The filter's recall is measured at those of these cuts that it reaches, and at its own.
RECALL_CUTS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)

# What every figure of a result means.
CMC_DEFINITIONS = {
    "standard": "share of valid queries with a match among the first k (standard CMC)",
    "unique_identity": "share of valid queries with a match among the first k identities, each at its best image",
    "single_gallery_shot": "chance of a match among the first k when one image of each identity is drawn",
}
AP_DEFINITIONS = {
    "mean": "mean over the valid queries of the mean precision at their matches",
    "trapezoid": "mean over the valid queries of the trapezoidal average precision (official Market-1501 code)",
    "top500": "mean over the valid queries of the mean precision at their matches among the first 500 images, cut "
    "before ignored ones are removed (Instruct-ReID's code)",
}
TIE_DEFINITIONS = {
    "expected": "exact expectation over random order of equally scored images",
    "index": "equally scored images in gallery order, as the cut at 500 needs",
}
DEFINITIONS = {
    "mINP": "mean over the valid queries of matches / rank of the last match",
    "tie_rate": "share of valid queries in which a match has the same score as a non-match",
    "interval": "2.5 and 97.5 percentiles of mAP over 1,000 seeded resamples of the queries; of several splits each "
    "is resampled within itself, and their unweighted mean is taken",
    "queries": "queries that are ranked; of several splits those of all, as are pairs_scored and skipped_queries",
    "gallery": "images that are ranked in any trial; of several splits the mean",
    "trials": "mAP and Rank-1 of each trial, or of each split",
    "valid_queries": "queries that have a match; of several splits those of all of them",
    "ranking": "candidates by the scorer, then everything the filter left out, in baseline order",
    "strict": "what the filter left out is not retrieved: matches there add nothing to mAP, miss in Rank-k, INP 0",
    "ceiling": "a perfect scorer on the same candidates, the rest in baseline order",
    "baseline": "the filter's own ranking",
    "filter_recall": "mean over queries of the share of their matches that the filter kept",
    "cut_tie_rate": "share of queries of which the filter left out an image as similar as one it kept (gallery order)",
    "filter_recall_at": "the same among the first k of the filter's ranking, equal similarities in gallery order",
}


@dataclass(frozen=True, slots=True)
class Ranking:
    """How one query ranks the gallery of one trial, G images of the whole gallery.

    Attributes:
        query: its index.
        places: (G,) the images' indices in the whole gallery, ascending.
        candidates: (K,) which of the G have a score.
        scores: (K,) as they rank.
        similarities: (G,) of the baseline, which order the rest; None: the rest is tied.
        matches: (G,) which are matches.
        ignored: (G,) which are removed from the ranking.
        shown: (K,) the scores as files and pages show them.
    """

    query: int
    places: IntArray
    candidates: IntArray
    scores: npt.NDArray[np.floating]
    similarities: ScoreArray | None
    matches: BoolArray
    ignored: BoolArray
    shown: ScoreArray

    def merge(self, scores: npt.NDArray[np.floating] | None = None) -> npt.NDArray[np.floating]:
        """Return one row of comparable scores (G,), as ``merge_scores``; with other scores (K,) if they are given."""
        values = self.scores if scores is None else scores
        return merge_scores(self.candidates, values, self.similarities, len(self.places))

    def list_order(self) -> IntArray:
        """Return the whole gallery's indices in ranking order, without ignored ones; ties in the order given."""
        order = self.candidates[np.argsort(-self.scores, kind="stable")]
        gone = self.ignored.copy()
        gone[self.candidates] = True
        tail = np.flatnonzero(~gone)
        if self.similarities is not None:
            tail = tail[np.argsort(-self.similarities[tail], kind="stable")]
        return self.places[np.concatenate([order[~self.ignored[order]], tail])]

    def list_scores(self) -> dict[int, float]:
        """Return the scores by the images' indices in the whole gallery."""
        return dict(zip(self.places[self.candidates].tolist(), self.shown.tolist(), strict=True))


def merge_scores(
    kept: IntArray, scores: npt.NDArray[np.floating], similarities: ScoreArray | None, size: int
) -> npt.NDArray[np.floating]:
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
        if len(kept) == size:
            row = np.empty(size, dtype=scores.dtype)
        else:
            lowest = np.float64(scores.min()) if len(scores) else np.float64(0.0)
            row = np.full(size, np.nextafter(lowest, -np.inf))
        row[kept] = scores
        return row
    row = similarities.astype(np.float64)
    if len(kept):
        places = np.unique(scores, return_inverse=True)[1]
        row[kept] = float(similarities.max()) + 1.0 + places
    return row


def iterate_rankings(plan: Plan, scores: Sequence[Sequence[ScoreArray]]) -> Iterator[list[Ranking]]:
    """Yield for each query its ranking in every trial; one row of similarities, or of a file, is in memory at a time.

    Args:
        plan: what is ranked.
        scores: for each trial (K,) for each query, as ``plan.trial_candidates``; nothing where a file has them.
    """
    trials = [(places, plan.labels.take_gallery(places)) for places in plan.benchmark.trial_galleries]
    rows = plan.iterate_similarities()
    for query in range(len(plan.benchmark.queries)):
        row = None if rows is None else next(rows)
        if plan.matrix is not None and row is not None:
            check_row(row, query, plan.benchmark, plan.matrix)
            yield [_rank_row(query, places, labels, row[places], plan.matrix) for places, labels in trials]
            continue
        rankings: list[Ranking] = []
        for (places, labels), kept, values in zip(trials, plan.trial_candidates, scores, strict=True):
            chosen, similarities = kept[query], row
            if plan.benchmark.trials:
                chosen = np.searchsorted(places, chosen)
                similarities = None if row is None else row[places]
            masks = labels.find_positives(query), labels.find_ignored(query)
            rankings.append(Ranking(query, places, chosen, values[query], similarities, *masks, values[query]))
        yield rankings


def _rank_row(query: int, places: IntArray, labels: Labels, row: npt.NDArray[Any], matrix: Matrix) -> Ranking:
    """Return the ranking of a file's scores (G,); what lacks one follows, tied."""
    matches, ignored = labels.find_positives(query), labels.find_ignored(query)
    chosen = np.flatnonzero(~np.isnan(row) & ~ignored) if matrix.may_lack else np.arange(len(row))
    # float32 is written, in which neighbours of float64 would tie.
    values, shown = read_row(row[chosen], query, len(chosen)), row[chosen].astype(np.float32)
    return Ranking(query, places, chosen, values, None, matches, ignored, shown)


@dataclass(frozen=True, slots=True)
class Measured:
    """The means over the trials.

    Attributes:
        ranking: candidates by the scorer, the rest in baseline order: the ones to quote.
        strict: the same with everything after the filter not retrieved.
        ceiling: a perfect scorer inside the filter.
        baseline: the filter's own ranking; None without a filter.
        recall: mean share of a query's matches that the filter kept.
        recall_at: the same if it had kept the first k alone, for several k; empty without a filter.
        cut_tie_rate: share of queries of which the filter left out an image as similar as one it kept.
        trials: the ``ranking`` of each trial.
        doubt: why the scores of a file seem to stand the wrong way round; empty if they do not.
    """

    ranking: RankingMetrics
    strict: RankingMetrics
    ceiling: RankingMetrics
    baseline: RankingMetrics | None
    recall: float
    recall_at: dict[int, float]
    cut_tie_rate: float
    trials: tuple[RankingMetrics, ...]
    doubt: str = ""


class _Trial:
    """The meters of one trial, and what its filter kept."""

    def __init__(self, plan: Plan, labels: Labels, most: int) -> None:
        """``most``: the largest number of candidates that the filter keeps."""
        names = ["ranking", "ceiling", *(["strict"] if plan.has_tail else [])]
        names += ["baseline"] if plan.features is not None else []
        matrix, benchmark = plan.matrix, plan.benchmark
        # Features have no direction, and of pairs without a score nobody knows on which side they stand.
        probe = matrix is not None and matrix.values is not None and not matrix.may_lack
        self.meters = {
            name: RankingMeter(
                labels,
                average_precision=benchmark.average_precision,
                cmc=benchmark.cmc,
                ties=benchmark.ties,
                topk=CURVE_RANKS,
                probe=probe and name == "ranking",
            )
            for name in names
        }
        self.shares: list[float] = []
        self.cut_ties: list[bool] = []
        self.cuts = sorted({cut for cut in RECALL_CUTS if cut < most} | {most} - {0})
        self.shares_at = np.zeros(len(self.cuts))

    def add(self, ranking: Ranking) -> QueryMetrics | None:
        """Measure one query; return its own figures, None if it has no match."""
        row, query = ranking.merge(), ranking.query
        perfect = ranking.matches[ranking.candidates].astype(np.float32)
        found = self.meters["ranking"].add(query, row)
        self.meters["ceiling"].add(query, ranking.merge(perfect))
        if "strict" in self.meters:
            self.meters["strict"].add(query, row, len(ranking.candidates))
        if "baseline" in self.meters and ranking.similarities is not None:
            self.meters["baseline"].add(query, ranking.similarities)
            self.cut_ties.append(is_cut_through_ties(ranking.similarities, ranking.candidates, ranking.ignored))
        matches = max(1, int(np.count_nonzero(ranking.matches)))
        self.shares.append(float(perfect.sum()) / matches)
        # Candidates stand in baseline order, which is what the filter cuts.
        self.shares_at += [float(perfect[:cut].sum()) / matches for cut in self.cuts]
        return found

    def summarise(self) -> dict[str, RankingMetrics]:
        """Return each meter's means; without a tail nothing is left unretrieved."""
        found = {name: meter.summarise() for name, meter in self.meters.items()}
        return {"strict": found["ranking"], **found}

    def describe_recall(self) -> dict[int, float]:
        """Return the mean share of a query's matches among its first k candidates, for each cut k."""
        return dict(zip(self.cuts, (self.shares_at / max(1, len(self.shares))).tolist(), strict=True))


def measure(
    plan: Plan, scores: Sequence[Sequence[ScoreArray]], show: Callable[[Ranking, float | None], None] | None = None
) -> Measured:
    """Return the metrics of the scores.

    Args:
        plan: what was scored.
        scores: as in ``iterate_rankings``.
        show: is handed each query's ranking of the first trial and its average precision, None if it has no match.
    """
    filtered = plan.features is not None
    trials = [
        _Trial(plan, plan.labels.take_gallery(places), max(map(len, kept), default=0) if filtered else 0)
        for places, kept in zip(plan.benchmark.trial_galleries, plan.trial_candidates, strict=True)
    ]
    for rankings in iterate_rankings(plan, scores):
        figures = [trial.add(ranking) for trial, ranking in zip(trials, rankings, strict=True)]
        if show is not None:
            show(rankings[0], None if figures[0] is None else figures[0].average_precision)
    found = [trial.summarise() for trial in trials]

    def average(name: str) -> RankingMetrics:
        return average_metrics([one[name] for one in found], same_queries=True)

    advice = "" if plan.matrix is None else f"save them negated in {plan.matrix.path}"
    return Measured(
        ranking=average("ranking"),
        strict=average("strict"),
        ceiling=average("ceiling"),
        baseline=average("baseline") if filtered else None,
        recall=float(np.mean([trial.shares for trial in trials])),
        recall_at=average_recalls([trial.describe_recall() for trial in trials]),
        cut_tie_rate=float(np.mean([trial.cut_ties for trial in trials])) if filtered else 0.0,
        trials=tuple(one["ranking"] for one in found),
        doubt=trials[0].meters["ranking"].direction.explain(advice),
    )


def average_recalls(recalls: Sequence[dict[int, float]]) -> dict[int, float]:
    """Return the mean at each k that all trials or splits have."""
    common = [cut for cut in recalls[0] if all(cut in one for one in recalls)]
    return {cut: float(np.mean([one[cut] for one in recalls])) for cut in common}


def average_metrics(metrics: Sequence[RankingMetrics], *, same_queries: bool) -> RankingMetrics:
    """Return the unweighted mean of the metrics of several trials, or of several splits.

    Trials ask the same queries: each query's figures are averaged, and the interval resamples queries. Splits have
    queries of their own: those of all count as valid, their figures stand one split after another, and the interval
    resamples the queries of each split.
    """
    if len(metrics) == 1:
        return metrics[0]

    def group(figures: list[FloatArray]) -> list[FloatArray]:
        return [np.mean(figures, axis=0)] if same_queries else figures

    groups = group([one.average_precisions for one in metrics])
    joined = np.concatenate(groups)
    numbered = metrics[:1] if same_queries else metrics
    return RankingMetrics(
        mean_ap=float(np.mean([one.mean_ap for one in metrics])),
        cmc={k: float(np.mean([one.cmc[k] for one in metrics])) for k in metrics[0].cmc},
        mean_inp=float(np.mean([one.mean_inp for one in metrics])),
        valid_queries=len(joined),
        invalid_queries=tuple(query for one in numbered for query in one.invalid_queries),
        tie_rate=float(np.mean([one.tie_rate for one in metrics])),
        average_precisions=joined,
        inverse_negative_penalties=np.concatenate(group([one.inverse_negative_penalties for one in metrics])),
        query_indices=np.concatenate([one.query_indices for one in numbered]),
        interval=bootstrap_interval(*groups),
    )


def define_terms(benchmark: Benchmark) -> dict[str, str]:
    """Return what every figure means under this benchmark."""
    return {
        "mAP": AP_DEFINITIONS[benchmark.average_precision],
        "Rank-k": CMC_DEFINITIONS[benchmark.cmc],
        "ties": TIE_DEFINITIONS[benchmark.ties],
        **DEFINITIONS,
    }


def iterate_ranked_scores(plan: Plan, scores: list[list[ScoreArray]]) -> Iterator[ScoreArray]:
    """Yield the scores (G,) of each query as they are ranked, NaN where a pair was not scored; one row in memory.

    Args:
        plan: what was scored.
        scores: for each trial (K,) for each query, as ``plan.trial_candidates``; empty where a file has them.
    """
    if plan.matrix is not None:
        for row in plan.matrix.iterate_rows():
            yield row.astype(np.float32)
        return
    for query in range(len(plan.benchmark.queries)):
        row = np.full(len(plan.benchmark.gallery), np.nan, dtype=np.float32)
        # A pair that several trials rank has one score.
        for candidates, values in zip(plan.trial_candidates, scores, strict=True):
            row[candidates[query]] = values[query]
        yield row

"""The metrics of an evaluation: four rankings of every trial, measured in one pass over the queries, then averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..datasets.matching import Labels
from .arrays import BoolArray, FloatArray, IntArray, ScoreArray
from .candidates import Plan
from .external import Matrix, check_row
from .filtering import is_cut_through_ties
from .matches import Ignore
from .metrics import RankingMeter, RankingMetrics, bootstrap_interval
from .ranking import merge_scores


# The CMC is measured at each of these ranks, for its curve.
CURVE_RANKS = tuple(range(1, 51))
# The filter's recall is measured at those of these cuts that it reaches, and at its own.
RECALL_CUTS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)


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
    """The four meters of one trial."""

    def __init__(self, plan: Plan, places: IntArray, candidates: Sequence[IntArray]) -> None:
        self.places, self.candidates = places, candidates
        self.labels = plan.labels.take_gallery(places)
        self.whole = len(places) == len(plan.protocol.gallery)
        names = ["ranking", "strict", "ceiling"] + (["baseline"] if plan.gallery_features is not None else [])
        matrix = plan.matrix
        # Features have no direction, and of pairs without a score nobody knows on which side they stand.
        probe = matrix is not None and matrix.values is not None and not matrix.may_lack
        self.meters = {name: self._make_meter(plan, self.labels, probe and name == "ranking") for name in names}
        self.shares: list[float] = []
        self.cut_ties: list[bool] = []
        most = max(map(len, candidates), default=0) if plan.gallery_features is not None else 0
        self.cuts = sorted({cut for cut in RECALL_CUTS if cut < most} | {most} - {0})
        self.shares_at = np.zeros(len(self.cuts))

    @staticmethod
    def _make_meter(plan: Plan, labels: Labels, probe: bool) -> RankingMeter:
        rule = plan.protocol.rule
        ignore: Ignore = labels.find_ignored
        if rule in ("nothing", "same_camera") and not labels.copies:
            ignore = rule
        return RankingMeter(
            labels.query_person,
            labels.gallery_person,
            labels.query_camera,
            labels.gallery_camera,
            ignore=ignore,
            average_precision=plan.protocol.average_precision,
            cmc=plan.protocol.cmc,
            ties=plan.protocol.ties,
            topk=CURVE_RANKS,
            probe=probe,
        )

    def add(self, query: int, scores: ScoreArray, similarities: ScoreArray | None) -> None:
        """Measure one query, whose candidates in this trial have ``scores``."""
        chosen = self.candidates[query]
        if not self.whole:
            chosen = np.searchsorted(self.places, chosen)
            similarities = None if similarities is None else similarities[self.places]
        size = len(self.places)
        row = merge_scores(chosen, scores, similarities, size)
        positives = self.labels.find_positives(query)
        perfect = positives[chosen].astype(np.float32)
        self.meters["ranking"].add(query, row)
        self.meters["strict"].add(query, row, len(chosen))
        self.meters["ceiling"].add(query, merge_scores(chosen, perfect, similarities, size))
        if similarities is not None:
            self.meters["baseline"].add(query, similarities)
            self.cut_ties.append(is_cut_through_ties(similarities, chosen, self.labels.find_ignored(query)))
        matches = max(1, int(np.count_nonzero(positives)))
        self.shares.append(float(perfect.sum()) / matches)
        # Candidates stand in baseline order, which is what the filter cuts.
        self.shares_at += [float(perfect[:cut].sum()) / matches for cut in self.cuts]

    def add_row(self, query: int, row: npt.NDArray[Any], lacks: BoolArray | None) -> None:
        """Measure one query of a file, of whose whole gallery the scores are; what ``lacks`` one follows, tied."""
        row, positives = row[self.places], self.labels.find_positives(query)
        chosen = np.arange(len(row))
        if lacks is not None:
            # Ignored images are in no ranking, so that it does not matter whether they have a score.
            chosen = np.flatnonzero(~lacks[self.places] & ~self.labels.find_ignored(query))
            row = merge_scores(chosen, row[chosen], None, len(row))
            self.meters["strict"].add(query, row, len(chosen))
        perfect = positives[chosen].astype(np.float32)
        self.meters["ranking"].add(query, row)
        self.meters["ceiling"].add(query, merge_scores(chosen, perfect, None, len(row)))
        self.shares.append(float(perfect.sum()) / max(1, int(np.count_nonzero(positives))))

    def describe_recall(self) -> dict[int, float]:
        """Return the mean share of a query's matches among its first k candidates, for each cut k."""
        return dict(zip(self.cuts, (self.shares_at / max(1, len(self.shares))).tolist(), strict=True))


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


def _measure_matrix(plan: Plan, matrix: Matrix) -> Measured:
    """Return the metrics of a file's scores: of every pair unless the file says which it lacks."""
    empty = [np.empty(0, dtype=np.int64)] * len(plan.protocol.queries)
    trials = [_Trial(plan, places, empty) for places in plan.protocol.trial_galleries]
    for query, row in enumerate(matrix.iterate_rows()):
        check_row(row, query, plan.protocol, matrix)
        for trial in trials:
            trial.add_row(query, row, np.isnan(row) if matrix.may_lack else None)

    def average(name: str) -> RankingMetrics:
        return average_metrics([trial.meters[name].summarise() for trial in trials], same_queries=True)

    ranking = average("ranking")
    return Measured(
        ranking=ranking,
        strict=average("strict") if matrix.may_lack else ranking,
        ceiling=average("ceiling"),
        baseline=None,
        recall=float(np.mean([trial.shares for trial in trials])),
        recall_at={},
        cut_tie_rate=0.0,
        trials=tuple(trial.meters["ranking"].summarise() for trial in trials),
        doubt=trials[0].meters["ranking"].direction.explain(f"save them negated in {matrix.path}"),
    )


def measure(plan: Plan, scores: Sequence[Sequence[ScoreArray]]) -> Measured:
    """Return the metrics of the scores, Q arrays for each trial, as ``plan.trial_candidates``.

    One row of similarities is in memory at a time.
    """
    if plan.matrix is not None:
        return _measure_matrix(plan, plan.matrix)
    trials = [
        _Trial(plan, places, candidates)
        for places, candidates in zip(plan.protocol.trial_galleries, plan.trial_candidates, strict=True)
    ]
    rows = plan.iterate_similarities()
    for query in range(len(plan.protocol.queries)):
        similarities = None if rows is None else next(rows)
        for trial, values in zip(trials, scores, strict=True):
            trial.add(query, values[query], similarities)
    found = [{name: meter.summarise() for name, meter in trial.meters.items()} for trial in trials]

    def average(name: str) -> RankingMetrics:
        return average_metrics([one[name] for one in found], same_queries=True)

    return Measured(
        ranking=average("ranking"),
        strict=average("strict"),
        ceiling=average("ceiling"),
        baseline=average("baseline") if rows is not None else None,
        recall=float(np.mean([trial.shares for trial in trials])),
        cut_tie_rate=float(np.mean([trial.cut_ties for trial in trials])) if rows is not None else 0.0,
        recall_at=average_recalls([trial.describe_recall() for trial in trials]),
        trials=tuple(one["ranking"] for one in found),
    )

"""An evaluation from settings to files: protocol, filter, scorer, store, ranking, metrics, report, in this order."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..eval_settings import EvalSettings
from .backends import Confidence, make_scorer
from .html import build_query_view, write_page
from .metrics import RankingMetrics, evaluate_ranking
from .plan import Plan, make_plan
from .processes import Processes
from .ranking import iterate_rows, measure_recall, order_gallery, score_perfectly
from .report import CURVE_RANKS, Results, build_ranking_row, write_rankings, write_results
from .scoring import describe_fingerprint, score_queries
from .store import ScoreStore
from .ties import IntArray


ScoreArray = npt.NDArray[np.float32]


def _measure(
    plan: Plan, scores: Sequence[ScoreArray], kept: Sequence[IntArray], *, strict: bool = False
) -> RankingMetrics:
    labels = plan.labels
    return evaluate_ranking(
        iterate_rows(kept, scores, plan.iterate_similarities()),
        labels.query_person,
        labels.gallery_person,
        labels.query_camera,
        labels.gallery_camera,
        ignore="same_camera" if labels.same_camera_ignored else None,
        average_precision=plan.protocol.average_precision,
        cmc=plan.protocol.cmc,
        topk=CURVE_RANKS,
        retrieved=[len(indices) for indices in kept] if strict else None,
    )


def _measure_all(
    settings: EvalSettings,
    plan: Plan,
    scores: Sequence[ScoreArray],
    fingerprint: Mapping[str, Any],
    path: Path,
    confidence: Confidence,
) -> Results:
    baseline = None
    if settings.filter != "none":
        # No candidates at all: every image is in the tail, which is the baseline's order.
        count = len(plan.protocol.queries)
        baseline = _measure(plan, [np.empty(0, np.float32)] * count, [np.empty(0, np.int64)] * count)
    return Results(
        settings=settings,
        protocol=plan.protocol,
        ranking=_measure(plan, scores, plan.kept),
        strict=_measure(plan, scores, plan.kept, strict=True),
        ceiling=_measure(plan, score_perfectly(plan.kept, plan.labels), plan.kept),
        baseline=baseline,
        filter_recall=measure_recall(plan.kept, plan.labels),
        pairs=sum(len(indices) for indices in plan.kept),
        fingerprint=fingerprint,
        scores_path=path,
        confidence=confidence,
    )


def _write_rankings_and_page(results: Results, plan: Plan, scores: Sequence[ScoreArray]) -> None:
    """Write ``rankings.parquet`` and, worst average precision first, the page of ranked galleries."""
    precisions = dict(
        zip(results.ranking.query_indices.tolist(), results.ranking.average_precisions.tolist(), strict=True)
    )
    worst = sorted(precisions, key=lambda query: (precisions[query], query))[: results.settings.report_queries]
    shown = set(worst)
    rows: list[dict[str, Any]] = []
    views: dict[int, dict[str, Any]] = {}
    for query, similarities in enumerate(plan.iterate_similarities()):
        ignored, matches = plan.labels.find_ignored(query), plan.labels.find_positives(query)
        order = order_gallery(plan.kept[query], scores[query], similarities, ignored)
        rows.append(build_ranking_row(plan.protocol, query, order, plan.kept[query], scores[query], matches))
        if query in shown:
            views[query] = build_query_view(
                plan.protocol, query, order, plan.kept[query], scores[query], matches, precisions[query]
            )
    output = results.settings.output_dir
    write_rankings(output / "rankings.parquet", rows)
    write_page(output / "report.html", results, [views[query] for query in worst])


def run_evaluation(settings: EvalSettings, processes: Processes | None = None) -> Results:
    """Run one evaluation and write its files into ``settings.output_dir``; finished queries are not scored again.

    Of several processes (``join_processes``) each scores its share; all return the results, the first one writes.

    Raises:
        ConfigError: settings that do not fit together.
        DataError: a missing manifest, image or feature, or no query with a match.
        UpstreamError: the model cannot be loaded or gives scores that are not numbers.
    """
    started, processes = time.monotonic(), processes or Processes()
    plan = make_plan(settings, processes)
    features = None
    if plan.query_features is not None and plan.gallery_features is not None:
        names = [query.query_id for query in plan.protocol.queries]
        names += [record.image_id for record in plan.protocol.gallery]
        features = dict(zip(names, [*plan.query_features, *plan.gallery_features], strict=True))
    scorer = make_scorer(settings, plan.protocol, features)
    fingerprint = describe_fingerprint(settings, scorer)
    if not processes.is_first:
        processes.wait()  # until the first has removed what it shall overwrite
    overwrite = settings.overwrite and processes.is_first
    with ScoreStore(settings.output_dir, fingerprint, overwrite=overwrite, rank=processes.rank) as store:
        if processes.is_first:
            processes.wait()
        scores = score_queries(settings, plan, scorer, store, processes)
    results = _measure_all(settings, plan, scores, fingerprint, store.path, scorer.confidence)
    if processes.is_first:
        _write_rankings_and_page(results, plan, scores)
        write_results(results, time.monotonic() - started, processes.count)
    return results

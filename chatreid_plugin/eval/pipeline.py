"""An evaluation from settings to files: protocol, filter, scorer, store, ranking, metrics, report, in this order."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import ConfigError, UpstreamError
from ..eval_settings import EvalSettings
from ..locks import hold_folder, make_folder
from .arrays import ScoreArray
from .backends import make_scorer
from .backends.base import Scorer, rank_weakness
from .candidates import Plan, choose_splits, list_shared_parts, make_plan, turn_plan, turn_scores
from .distributed import Processes
from .fusion import fuse_scores
from .html import build_query_view, write_page
from .inputs import read_row
from .matrix_file import check_target, iterate_ranked_scores, write_matrix
from .measuring import Measured, average_metrics, average_recalls, measure
from .questions import name_scores
from .ranking import order_gallery
from .report import Results, build_ranking_row, describe_results, write_rankings, write_results
from .scores import SavedScorer, ScoreStore, find_saved, hash_images, keep_features, name_model, remove_scores
from .scoring import check_agreement, describe_fingerprint, describe_questions, score_queries


logger = logging.getLogger(__name__)


def _write_rankings_and_page(results: Results, plan: Plan, scores: Sequence[ScoreArray]) -> None:
    """Write ``rankings.parquet`` and, worst average precision first, the page of the first trial's galleries.

    Args:
        results: what was measured.
        plan: what was scored.
        scores: (K,) for each query of the first trial; empty where a file has them.
    """
    first = results.measured.trials[0]
    precisions = dict(zip(first.query_indices.tolist(), first.average_precisions.tolist(), strict=True))
    worst = sorted(precisions, key=lambda query: (precisions[query], query))[: results.settings.report_queries]
    shown = set(worst)
    figures = results.figures
    rows: list[dict[str, Any]] = []
    views: dict[int, dict[str, Any]] = {}
    similarities = plan.iterate_similarities()
    outside = np.ones(len(plan.protocol.gallery), dtype=np.bool_)
    outside[plan.protocol.trial_galleries[0]] = False
    for query, candidates in enumerate(plan.trial_candidates[0]):
        row = None if similarities is None else next(similarities)
        left_out, matches = plan.labels.find_ignored(query) | outside, plan.labels.find_positives(query)
        if plan.matrix is not None and row is not None:
            candidates = np.flatnonzero(~left_out & ~(plan.matrix.may_lack & np.isnan(row)))
            # Ordered as the metrics read it; the files show float32, in which neighbours of float64 would tie.
            order = order_gallery(candidates, read_row(row[candidates], query, len(candidates)), None, left_out)
            values = row[candidates].astype(np.float32)
        else:
            values = scores[query]
            order = order_gallery(candidates, values, row, left_out)
        rows.append(build_ranking_row(plan.protocol, query, order, candidates, values, matches, figures.get(query)))
        if query in shown:
            precision = precisions[query]
            views[query] = build_query_view(plan.protocol, query, order, candidates, values, matches, precision)
    output = results.settings.output_dir
    write_rankings(output / "rankings.parquet", rows)
    write_page(output / "report.html", results, [views[query] for query in worst])


def run_evaluation(settings: EvalSettings, processes: Processes | None = None) -> Results:
    """Run one evaluation and write its files into ``settings.output_dir``; finished queries are not scored again.

    Of several processes (``join_processes``) each scores its share; all return the results, the first one writes. With
    ``splits`` each split is an evaluation in a folder of its own, and the results are their mean.

    Raises:
        ConfigError: settings that do not fit together, or an ``output_dir`` that cannot be written or that another
            evaluation is writing.
        DataError: a missing manifest, image or feature, or no query with a match.
        UpstreamError: the model cannot be loaded or gives scores that are not numbers.
    """
    return _run(settings, processes or Processes(), ())


def _run(settings: EvalSettings, processes: Processes, remarks: tuple[str, ...]) -> Results:
    """Run an evaluation, or one of its splits, of which all is to be said that is said of the whole."""
    started = time.monotonic()
    make_folder(settings.output_dir)
    with hold_folder(settings.output_dir, "evaluation") if processes.is_first else nullcontext():
        if settings.splits:
            remarks = list_shared_parts(settings)
            for remark in remarks if processes.is_first else ():
                logger.warning("%s", remark)
            splits = [_run(split, processes, remarks) for split in choose_splits(settings)]
            settings = settings.model_copy(update={"filter": splits[0].settings.filter})
            results = replace(average_splits(splits), settings=settings)
        else:
            results = _evaluate(settings, processes, remarks)
        if processes.is_first:
            write_results(settings.output_dir, describe_results(results), time.monotonic() - started, processes.count)
    return results


def _evaluate(settings: EvalSettings, processes: Processes, remarks: tuple[str, ...]) -> Results:
    if settings.save_matrix is not None:
        check_target(settings.save_matrix)
    saved = _find_saved(settings, processes) if settings.saved_scores else None
    plan = make_plan(settings, processes, saved)
    if settings.save_matrix is not None and settings.fusion != "none" and plan.protocol.trials:
        raise ConfigError(
            f"save_matrix: each of {len(plan.protocol.trials)} trials fuses on its own, so that a pair has no one "
            "score. Set fusion: none."
        )
    if plan.matrix is not None:
        pairs = plan.matrix.count_scores()
        path = plan.matrix.path
        fingerprint: dict[str, Any] = {"backend": settings.backend, "file": str(path), "bytes": path.stat().st_size}
        settings = settings.model_copy(update={"filter": "none"})  # whatever the YAML says, nothing was filtered
        confidence = "external" if settings.backend == "scores" else "similarities"
        measured = measure(plan, [])
        results = Results(settings, plan.protocol, measured, pairs, fingerprint, path, confidence, (), remarks)
        if measured.doubt and processes.is_first:
            logger.warning("%s", measured.doubt)
        if processes.is_first:
            _write_rankings_and_page(results, plan, [])
            _save_matrix(settings, plan, [])
        return results
    asked = turn_plan(plan) if plan.protocol.ranks_captions else plan
    scorer = saved or asked.scorer or _make_scorer(settings, asked)
    fingerprint = describe_fingerprint(settings, scorer)
    check_agreement(fingerprint, processes)
    contents = hash_images(asked.list_images(), plan.protocol.image_root, processes) if settings.asks_model else {}
    if settings.overwrite:
        remove_scores(settings.output_dir, fingerprint)  # by every process: machines may have disks of their own
        processes.wait()
    own: dict[str, Any] = {"contents": contents, "names": name_model(settings), "rank": processes.rank}
    if processes.is_first and plan.scorer is not None and (features := plan.features) is not None:
        keep_features(settings, plan.protocol, plan.scorer.fingerprint, features, plan.calibration)
    with ScoreStore(settings.output_dir, fingerprint, **own) as store:
        scores, confidence = score_queries(settings, asked, scorer, store, processes)
    if asked is not plan:
        scores = turn_scores(plan, scores)
    fused = fuse_scores(settings, plan, plan.share_scores(scores), confidence)
    pairs = sum(len(indices) for indices in plan.kept)
    measured = measure(plan, fused)
    named = name_scores(settings, plan.protocol.queries, confidence)
    found = settings, plan.protocol, measured, pairs, fingerprint, store.path, named
    results = Results(*found, remarks=remarks, calibration=plan.calibration)
    if processes.is_first:
        _write_rankings_and_page(results, plan, fused[0])
        _save_matrix(settings, plan, fused)
    return results


def _save_matrix(settings: EvalSettings, plan: Plan, scores: list[list[ScoreArray]]) -> None:
    if settings.save_matrix is not None:
        write_matrix(settings.save_matrix, plan.protocol, iterate_ranked_scores(plan, scores))


def _make_scorer(settings: EvalSettings, plan: Plan) -> Scorer:
    """Return the scorer; where the model is not to be had and scores are saved, say that they can do without it."""
    try:
        return make_scorer(settings, plan.protocol, plan.name_features())
    except (ConfigError, UpstreamError) as error:
        if not settings.asks_model or not any(settings.output_dir.glob("scores-*.jsonl")):
            raise
        hint = f"Scores that were saved in {settings.output_dir} can be ranked without the model: saved_scores=true."
        raise type(error)(f"{error} {hint}") from None


def _find_saved(settings: EvalSettings, processes: Processes) -> SavedScorer:
    """Return the stand-in for the model, in every process: other machines may have no files of scores."""
    found = [find_saved(settings, describe_questions(settings))] if processes.is_first else []
    return processes.gather(found)[0][0]


def _merge_cautions(cautions: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return what is to be said of all splits, each once; what only some have, with how many."""
    counts = Counter(text for texts in cautions for text in texts)
    total = len(cautions)
    return tuple(text if count == total else f"{text} ({count} of {total} splits)" for text, count in counts.items())


def average_splits(splits: Sequence[Results]) -> Results:
    """Return the unweighted mean of several splits' results.

    Valid queries, skipped ones and pairs are those of all splits; what else is no metric is the first one's,
    but for the confidence, which is the weakest one's.
    """
    measured = [one.measured for one in splits]
    baselines = [one.baseline for one in measured if one.baseline is not None]
    mean = Measured(
        ranking=average_metrics([one.ranking for one in measured], same_queries=False),
        strict=average_metrics([one.strict for one in measured], same_queries=False),
        ceiling=average_metrics([one.ceiling for one in measured], same_queries=False),
        baseline=average_metrics(baselines, same_queries=False) if baselines else None,
        recall=float(np.mean([one.recall for one in measured])),
        cut_tie_rate=float(np.mean([one.cut_tie_rate for one in measured])),
        recall_at=average_recalls([one.recall_at for one in measured]),
        trials=tuple(one.ranking for one in measured),
        doubt=next(filter(None, (one.doubt for one in measured)), ""),
    )
    first, mean_of = splits[0].protocol, f"mean of {len(splits)} splits"
    variant = first.variant.replace(first.split, mean_of) if first.split else f"{first.variant}; {mean_of}"
    protocol = replace(
        first,
        variant=variant,
        skipped=tuple(query for one in splits for query in one.protocol.skipped),
        copied_queries=sum(one.protocol.copied_queries for one in splits),
        unlike_published=next(filter(None, (one.protocol.unlike_published for one in splits)), ""),
        cautions=_merge_cautions([one.protocol.cautions for one in splits]),
    )
    return replace(
        splits[0],
        measured=mean,
        protocol=protocol,
        pairs=sum(one.pairs for one in splits),
        confidence=max(splits, key=lambda one: rank_weakness(one.confidence)).confidence,
        splits=tuple(splits),
        calibration=None,
    )

"""One evaluation, read from top to bottom: benchmark, candidates, scores, ranking, metrics, report."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import __version__, tasks
from ..archives import ScoreArray
from ..errors import ConfigError, DataError, UpstreamError
from ..locks import hold_folder, make_folder
from ..shards import write_shard
from .backends import Models, make_scorer
from .backends.base import QUERY_BLOCK, Confidence, Scorer
from .backends.files import check_target, write_matrix
from .candidates import Plan, make_plan, turn_plan, turn_scores
from .distributed import Processes
from .fusion import fuse_scores
from .measure import iterate_ranked_scores, measure
from .questions import PAIR_TASKS, describe_mode, name_scores, score_query
from .report import RANKING_SCHEMA, Results, ShownRankings, describe_results, write_page, write_results
from .scores import (
    SavedScorer,
    Scored,
    ScoreStore,
    digest_fingerprint,
    find_saved,
    hash_images,
    keep_features,
    name_model,
    remove_scores,
)
from .settings import EvalSettings
from .splits import average_splits, choose_splits, list_shared_parts


logger = logging.getLogger(__name__)


def run_evaluation(
    settings: EvalSettings, processes: Processes | None = None, models: Models | None = None
) -> Results:
    """Run one evaluation and write its files into its ``output_dir``; finished queries are not scored again.

    Of several processes (``join_processes``) each scores its share; all return the results, the first one writes. With
    ``splits`` each split is an evaluation in a folder of its own, and the results are their mean. ``models`` keeps the
    checkpoint for the next evaluation.

    Raises:
        ConfigError: settings that do not fit together, or an ``output_dir`` that cannot be written or that another
            evaluation is writing.
        DataError: a missing manifest, image or feature, or no query with a match.
        UpstreamError: the model cannot be loaded or gives scores that are not numbers.
    """
    return _run(settings, processes or Processes(), models or Models(), ())


def _run(settings: EvalSettings, processes: Processes, models: Models, remarks: tuple[str, ...]) -> Results:
    """Run an evaluation, or one of its splits, of which all is to be said that is said of the whole."""
    started, folder = time.monotonic(), settings.output.output_dir
    make_folder(folder)
    with hold_folder(folder, "evaluation") if processes.is_first else nullcontext():
        if settings.data.splits:
            remarks = list_shared_parts(settings)
            for remark in remarks if processes.is_first else ():
                logger.warning("%s", remark)
            splits = [_run(split, processes, models, remarks) for split in choose_splits(settings)]
            settings = settings.replace(filter={"source": splits[0].settings.filter.source})
            results = replace(average_splits(splits), settings=settings)
        else:
            results = _evaluate(settings, processes, models, remarks)
        if processes.is_first:
            write_results(folder, describe_results(results), time.monotonic() - started, processes.count)
    return results


def _evaluate(settings: EvalSettings, processes: Processes, models: Models, remarks: tuple[str, ...]) -> Results:
    if settings.output.save_matrix is not None:
        check_target(settings.output.save_matrix)
    saved = _find_saved(settings, processes) if settings.scoring.saved_scores else None
    plan = make_plan(settings, processes, saved, models)
    _check_save_matrix(settings, plan)
    if plan.matrix is None:
        scores, confidence, fingerprint, path = _score(settings, plan, saved, models, processes)
        ranked = fuse_scores(settings.scoring, plan, plan.share_scores(scores), confidence)
        confidence = name_scores(settings.scoring, plan.benchmark.queries, confidence)
        pairs = sum(len(indices) for indices in plan.kept)
    else:
        path, pairs, ranked = plan.matrix.path, plan.matrix.count_scores(), []
        backend = settings.scoring.backend
        fingerprint = {"backend": backend, "file": str(path), "bytes": path.stat().st_size}
        confidence: Confidence = "external" if backend == "scores" else "similarities"
        settings = settings.replace(filter={"source": "none"})  # whatever the YAML says, nothing was filtered
    shown = ShownRankings(plan.benchmark, settings.output.report_queries)
    measured = measure(plan, ranked, shown.add)
    found = settings, plan.benchmark, measured, pairs, fingerprint, path, confidence
    results = Results(*found, remarks=remarks, calibration=plan.calibration)
    if processes.is_first:
        if measured.doubt:
            logger.warning("%s", measured.doubt)
        output = settings.output.output_dir
        write_shard(output / "rankings.parquet", shown.list_rows(results.figures), RANKING_SCHEMA)
        write_page(output / "report.html", results, shown.build_views())
        if settings.output.save_matrix is not None:
            write_matrix(settings.output.save_matrix, plan.benchmark, iterate_ranked_scores(plan, ranked))
    return results


def _check_save_matrix(settings: EvalSettings, plan: Plan) -> None:
    if settings.output.save_matrix is not None and settings.scoring.fusion != "none" and plan.benchmark.trials:
        raise ConfigError(
            f"output.save_matrix: each of {len(plan.benchmark.trials)} trials fuses on its own, so that a pair has no "
            "one score. Set scoring.fusion: none."
        )


def _score(
    settings: EvalSettings, plan: Plan, saved: SavedScorer | None, models: Models, processes: Processes
) -> tuple[list[ScoreArray], Confidence, Mapping[str, Any], Path]:
    """Return the scores (K,) of every query's candidates, what they are and depend on, and the file that has them."""
    folder = settings.output.output_dir
    asked = turn_plan(plan) if plan.benchmark.ranks_captions else plan
    scorer = saved or asked.scorer or _make_scorer(settings, asked, models)
    fingerprint = describe_fingerprint(settings, scorer)
    check_agreement(fingerprint, processes)
    asks_model = settings.scoring.asks_model
    contents = hash_images(asked.list_images(), plan.benchmark.image_root, processes) if asks_model else {}
    if settings.output.overwrite:
        remove_scores(folder, fingerprint)  # by every process: machines may have disks of their own
        processes.wait()
    if processes.is_first and plan.scorer is not None and (features := plan.features) is not None:
        keep_features(settings, plan.benchmark, plan.scorer.fingerprint, features, plan.calibration)
    own: dict[str, Any] = {"contents": contents, "names": name_model(settings), "rank": processes.rank}
    with ScoreStore(folder, fingerprint, **own) as store:
        scores, confidence = score_queries(settings, asked, scorer, store, processes)
    return turn_scores(plan, scores) if asked is not plan else scores, confidence, fingerprint, store.path


def _make_scorer(settings: EvalSettings, plan: Plan, models: Models) -> Scorer:
    """Return the scorer; where the model is not to be had and scores are saved, say that they can do without it."""
    try:
        return make_scorer(settings, plan.benchmark, plan.name_features(), models)
    except (ConfigError, UpstreamError) as error:
        if not settings.scoring.asks_model or not any(settings.output.output_dir.glob("scores-*.jsonl")):
            raise
        hint = (
            f"Scores that were saved in {settings.output.output_dir} can be ranked without the model: "
            "scoring.saved_scores=true."
        )
        raise type(error)(f"{error} {hint}") from None


def _find_saved(settings: EvalSettings, processes: Processes) -> SavedScorer:
    """Return the stand-in for the model, in every process: other machines may have no files of scores."""
    found = [find_saved(settings, describe_questions(settings))] if processes.is_first else []
    return processes.gather(found)[0][0]


def describe_fingerprint(settings: EvalSettings, scorer: Scorer) -> dict[str, Any]:
    """Return everything that changes a pair's score but the images, for the store.

    What is in files (weights, features) and not where they are, so that a moved checkpoint keeps its scores.
    """
    # As it is read back from a file: JSON has no numbers for names, as a server's `logit_bias` has them.
    return json.loads(json.dumps({**scorer.fingerprint, **describe_questions(settings)}, sort_keys=True))


def check_agreement(fingerprint: Mapping[str, Any], processes: Processes) -> None:
    """Refuse processes that would not give the same scores, as machines with another copy of a checkpoint.

    Raises:
        ConfigError: in every process, and says in what they differ.
    """
    found = processes.gather(fingerprint)
    keys = {key for one in found for key in one}
    differing = sorted(key for key in keys if any(one.get(key) != found[0].get(key) for one in found))
    if differing:
        raise ConfigError(
            f"The processes do not score alike: they differ in {', '.join(differing)}. Give every machine the same "
            "model, settings and version of chatreid_plugin."
        )


def describe_questions(settings: EvalSettings) -> dict[str, Any]:
    """Return what of the fingerprint is known without the scorer: what it is asked, and how."""
    scoring, model = settings.scoring, settings.model
    mode = describe_mode(scoring, settings.data.benchmark)
    fingerprint: dict[str, Any] = {"backend": scoring.backend, "version": __version__, **mode}
    if scoring.backend == "features":
        fingerprint["filter"] = settings.filter.source
    if scoring.backend == "transformers":
        fingerprint["dtype"] = model.dtype
    if scoring.asks_model:
        fingerprint |= {
            # The system prompt is the scorer's to tell: a checkpoint or a server may have its own.
            "prompts": [tasks.format_chat_prompt(tasks.TASKS[name].prompts[0], system="") for name in PAIR_TASKS],
            "answers": [tasks.YES, tasks.NO],
            "chatreid_stage": model.chatreid_stage,
            "chatreid_aspect": model.chatreid_aspect,
            "image_max_pixels": model.image_max_pixels,
            "image_min_pixels": model.image_min_pixels,
        }
    return fingerprint


def score_queries(
    settings: EvalSettings, plan: Plan, scorer: Scorer, store: ScoreStore, processes: Processes
) -> tuple[list[ScoreArray], Confidence]:
    """Return the scores (K,) of every query's candidates and what they are, in every process.

    Queries that are in any process's store are not scored again; the others are shared out among the processes, and
    the first one's store holds all of them in the end. Where something was filled in, in this run or an earlier one,
    margins are no longer called that, since fusion takes margins for log-odds.

    Raises:
        DataError: scores are missing, with ``saved_scores``, or the processes have not the same to score.
    """
    queries = plan.benchmark.queries
    # Other machines have disks of their own, where older scores may be left: the first one's count.
    for finished in reversed(processes.gather(store.finished)):
        store.finished |= finished
    keys = [store.make_key(query, plan.list_candidates(index)) for index, query in enumerate(queries)]
    if len(set(processes.gather(digest_fingerprint({"keys": keys})))) > 1:
        raise DataError(
            "The processes do not have the same queries and candidates. Give every machine the same manifest, images "
            "and features."
        )
    counts = [len(candidates) for candidates in plan.kept]
    pending = [index for index, key in enumerate(keys) if store.get(key, counts[index]) is None]
    if pending and settings.scoring.saved_scores:
        raise DataError(
            f"scoring.saved_scores: {store.path} lacks the scores of {len(pending)} of {len(queries)} queries, first "
            f"of {queries[pending[0]].label}. Its run is unfinished, or the filter's keys, queries, gallery or images "
            "were others. Set them as they were, or score what is missing with the model (scoring.saved_scores=false)."
        )
    if len(pending) < len(queries) and processes.is_first:
        finished = len(queries) - len(pending)
        logger.warning("%d of %d queries were scored before (%s).", finished, len(queries), store.path)
    share = processes.take_share(pending)
    for index, scored in _iterate_share(settings, plan, scorer, share, show=processes.is_first):
        store.add(keys[index], scored)
    for finished in processes.gather({keys[index]: store.finished[keys[index]] for index in share}):
        store.finished |= finished
    if processes.is_first:
        store.take_over()
    known = [store.finished[key] for key in keys]
    is_filled = any(scored.filled for scored in known)
    confidence = "top_logprobs" if is_filled and scorer.confidence == "margins" else scorer.confidence
    return [scored.scores for scored in known], confidence


def _iterate_share(
    settings: EvalSettings, plan: Plan, scorer: Scorer, share: Sequence[int], *, show: bool
) -> Iterator[tuple[int, Scored]]:
    """Yield each query of one process as it is finished; a bar counts the pairs."""
    if not share:
        return
    queries = plan.benchmark.queries
    needed: list[int] = np.unique(np.concatenate([plan.kept[query] for query in share])).tolist()
    starts = sorted({index // QUERY_BLOCK * QUERY_BLOCK for index in share})
    blocks = [query for start in starts for query in queries[start : start + QUERY_BLOCK]]
    scorer.prepare(blocks, [plan.benchmark.gallery[index] for index in needed], plan.list_images())
    total = sum(len(plan.kept[index]) for index in share)
    with tqdm(total=total, desc="scoring", unit="pair", unit_scale=True, disable=not show) as progress:
        for index in share:
            candidates = plan.list_candidates(index)
            before = scorer.filled
            scores = score_query(settings.scoring, settings.data.benchmark, scorer, queries[index], candidates)
            yield index, Scored(scores, scorer.filled > before)
            progress.update(len(candidates))

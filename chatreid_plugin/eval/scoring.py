"""Score what is planned and not yet in the store: the long part of an evaluation, which may be killed at any time."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import __version__, tasks
from ..errors import ConfigError, DataError
from ..eval_settings import EvalSettings
from .arrays import ScoreArray
from .backends.base import QUERY_BLOCK, Confidence, Scorer
from .candidates import Plan
from .distributed import Processes
from .questions import PAIR_TASKS, describe_mode, score_query
from .scores import Scored, ScoreStore, digest_fingerprint


logger = logging.getLogger(__name__)


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
    fingerprint: dict[str, Any] = {"backend": settings.backend, "version": __version__, **describe_mode(settings)}
    if settings.backend == "features":
        fingerprint["filter"] = settings.filter
    if settings.backend == "transformers":
        fingerprint["dtype"] = settings.dtype
    if settings.asks_model:
        fingerprint |= {
            # The system prompt is the scorer's to tell: a checkpoint or a server may have its own.
            "prompts": [tasks.format_chat_prompt(tasks.TASKS[name].prompts[0], system="") for name in PAIR_TASKS],
            "answers": [tasks.YES, tasks.NO],
            "chatreid_stage": settings.chatreid_stage,
            "chatreid_aspect": settings.chatreid_aspect,
            "image_max_pixels": settings.image_max_pixels,
            "image_min_pixels": settings.image_min_pixels,
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
    queries = plan.protocol.queries
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
    if pending and settings.saved_scores:
        raise DataError(
            f"saved_scores: {store.path} lacks the scores of {len(pending)} of {len(queries)} queries, first of "
            f"{queries[pending[0]].label}. Its run is unfinished, or the filter's keys, queries, gallery or images "
            "were others. Set them as they were, or score what is missing with the model (saved_scores=false)."
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
    queries = plan.protocol.queries
    needed: list[int] = np.unique(np.concatenate([plan.kept[query] for query in share])).tolist()
    starts = sorted({index // QUERY_BLOCK * QUERY_BLOCK for index in share})
    blocks = [query for start in starts for query in queries[start : start + QUERY_BLOCK]]
    scorer.prepare(blocks, [plan.protocol.gallery[index] for index in needed], plan.list_images())
    total = sum(len(plan.kept[index]) for index in share)
    with tqdm(total=total, desc="scoring", unit="pair", unit_scale=True, disable=not show) as progress:
        for index in share:
            candidates = plan.list_candidates(index)
            before = scorer.filled
            scores = score_query(settings, scorer, queries[index], candidates)
            yield index, Scored(scores, scorer.filled > before)
            progress.update(len(candidates))

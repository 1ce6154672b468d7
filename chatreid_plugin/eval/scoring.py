"""Score what is planned and not yet in the store: the long part of an evaluation, which may be killed at any time."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from .. import __version__, tasks
from ..eval_settings import EvalSettings
from .backends import Scorer
from .modes import score_query
from .plan import Plan
from .prompts import IMAGE_PAIR, TEXT_PAIR
from .store import ScoreStore


ScoreArray = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)


def describe_fingerprint(settings: EvalSettings, scorer: Scorer) -> dict[str, Any]:
    """Return everything that changes a pair's score, for the store."""
    fingerprint: dict[str, Any] = {"backend": settings.backend, "version": __version__, **scorer.fingerprint}
    if settings.backend == "features":
        fingerprint |= {
            "filter": settings.filter,
            "filter_features": str(settings.filter_features),
            "filter_weights": str(settings.filter_weights),
        }
    if settings.backend == "transformers":
        fingerprint |= {
            "model_name_or_path": settings.model_name_or_path,
            "dtype": settings.dtype,
            "mode": settings.mode,
            "prompts": [tasks.format_chat_prompt(tasks.TASKS[name].prompts[0]) for name in (IMAGE_PAIR, TEXT_PAIR)],
            "answers": [tasks.YES, tasks.NO],
            "chatreid_stage": settings.chatreid_stage,
            "chatreid_aspect": settings.chatreid_aspect,
            "image_max_pixels": settings.image_max_pixels,
            "image_min_pixels": settings.image_min_pixels,
        }
    return fingerprint


def score_queries(settings: EvalSettings, plan: Plan, scorer: Scorer, store: ScoreStore) -> list[ScoreArray]:
    """Return the scores (K,) of every query's candidates; queries already in the store are not scored again."""
    queries = plan.protocol.queries
    scores = [store.get(query, plan.list_candidates(index)) for index, query in enumerate(queries)]
    pending = [index for index, saved in enumerate(scores) if saved is None]
    if len(pending) < len(queries):
        finished = len(queries) - len(pending)
        logger.warning("%d of %d queries were scored before (%s).", finished, len(queries), store.path)
    if pending:
        needed: list[int] = np.unique(np.concatenate([plan.kept[query] for query in pending])).tolist()
        gallery = [plan.protocol.gallery[index] for index in needed]
        scorer.prepare([queries[index] for index in pending], gallery)
    total = sum(len(indices) for indices in plan.kept)
    done = total - sum(len(plan.kept[index]) for index in pending)
    with tqdm(total=total, initial=done, desc="scoring", unit="pair", unit_scale=True) as progress:
        for index in pending:
            candidates = plan.list_candidates(index)
            values = score_query(settings, scorer, queries[index], candidates)
            store.add(queries[index], candidates, values)
            scores[index] = values
            progress.update(len(candidates))
    return [values for values in scores if values is not None]

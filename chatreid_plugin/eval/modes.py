"""How the model is asked about a query's candidates: pair by pair, by choice or in turns; between filter and store."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, UpstreamError
from ..eval_settings import EvalSettings
from ..records import ImageRecord
from ..tasks import TASKS
from .arrays import FloatArray, ScoreArray
from .backends import Confidence, Scorer
from .choosing import choose_in_turns, choose_in_windows, count_turn_questions, count_window_questions
from .prompts import describe_in_words, list_pair_tasks
from .queries import Query


SMALLEST_SPREAD = 1e-6  # relative; fp32 scores that differ by less are one number
# Which choice a model is trained to make on each benchmark (paper section 3.3); others: standard_reid.
CHOICE_TASKS = {
    "ltcc": "cloth_changing_reid",
    "prcc": "cloth_changing_reid",
    "sysumm01": "visible_infrared_reid",
    "regdb": "visible_infrared_reid",
    "llcm": "visible_infrared_reid",
}


def score_query(settings: EvalSettings, scorer: Scorer, query: Query, candidates: Sequence[ImageRecord]) -> ScoreArray:
    """Return the scores (K,) of a query's candidates in the mode of the settings; their order is the ranking.

    ``pointwise``: the margin of Yes over No for each candidate (paper section 4.1, response confidence); of a query
    with image and words see ``combine_margins``. ``choice`` and ``turns``: see ``choosing``.

    Raises:
        ConfigError: the query cannot be asked in this mode.
        UpstreamError: the scorer gave other than one finite number a candidate.
    """
    if not candidates:
        return np.empty(0, dtype=np.float32)
    if settings.mode == "pointwise":
        tasks = list_pair_tasks(query, settings.text_weight is not None)
        if not tasks:
            raise ConfigError(f"Query {query.query_id} has neither an image nor words; there is nothing to ask.")
        margins = [check_scores(query, candidates, scorer.score_pairs(query, candidates, task)) for task in tasks]
        return margins[0] if len(margins) == 1 else combine_margins(margins[0], margins[1], settings.text_weight)
    task = pick_choice_task(settings, query)

    def choose(windows: Sequence[Sequence[int]]) -> list[ScoreArray]:
        lettered = [[candidates[position] for position in window] for window in windows]
        answers = scorer.choose(query, lettered, task)
        return [check_scores(query, window, values) for window, values in zip(lettered, answers, strict=True)]

    ask = choose_in_windows if settings.mode == "choice" else choose_in_turns
    scores = ask(choose, len(candidates), settings.window, settings.shifts, query.query_id, settings.seed)
    return scores.astype(np.float32)


def standardise(scores: npt.NDArray[Any]) -> FloatArray:
    """Return scores (K,) with mean 0 and standard deviation 1; zeros where they are all (nearly) equal."""
    values = np.asarray(scores, dtype=np.float64)
    centred = values - values.mean()
    spread = float(centred.std())
    if spread <= SMALLEST_SPREAD * max(1.0, float(np.abs(values).max())):
        return np.zeros_like(centred)
    return centred / spread


def combine_margins(
    image_margins: ScoreArray, text_margins: ScoreArray, text_weight: float | None = None
) -> ScoreArray:
    """Return image + text_weight * text (None: 1), each standardised over the query's candidates, (K,).

    The adaptive multi-modal query (paper section 4.2). Standardised, since one question may be answered with larger
    margins than the other; a question whose answers do not differ says nothing and adds nothing.
    """
    weight = 1.0 if text_weight is None else text_weight
    return (standardise(image_margins) + weight * standardise(text_margins)).astype(np.float32)


def pick_choice_task(settings: EvalSettings, query: Query) -> str:
    """Return the question of ``choice`` and ``turns``: ``choice_task``, or what fits the query and the protocol."""
    if settings.choice_task is not None:
        return settings.choice_task
    if query.image is not None and describe_in_words(query):
        return "multimodal_retrieval"
    if query.image is None:
        return "text_to_image_reid" if query.text else "attribute_retrieval"
    return CHOICE_TASKS.get(settings.protocol, "standard_reid")


def name_scores(settings: EvalSettings, queries: Sequence[Query], confidence: Confidence) -> Confidence:
    """Return what the mode's scores of these queries are, made of what the scorer gives.

    Weaker sources keep their name in any mode.
    """
    if confidence not in ("margins", "similarities"):
        return confidence
    if settings.mode != "pointwise":
        return "log_odds" if settings.mode == "choice" else "order"
    separately = settings.text_weight is not None
    return "standardised" if any(len(list_pair_tasks(query, separately)) > 1 for query in queries) else confidence


def describe_mode(settings: EvalSettings) -> dict[str, Any]:
    """Return what of the mode changes scores, for the store's fingerprint."""
    if settings.mode == "pointwise":
        return {"mode": settings.mode, "text_weight": settings.text_weight}
    keys = ("mode", "window", "shifts", "seed", "choice_task", "protocol")
    prompts = {name: task.prompts[0] for name, task in TASKS.items() if task.answer_kind == "letters"}
    return {key: getattr(settings, key) for key in keys} | {"choice_prompts": prompts}


def describe_cost(settings: EvalSettings, candidates: int, queries: int) -> str:
    """Say how many questions at most a mode asks of the model."""
    if settings.mode == "pointwise":
        return (
            f"Mode pointwise: at most {candidates:,} candidates a query, one question each, or two where an image and "
            "words ask separately."
        )
    count = count_window_questions if settings.mode == "choice" else count_turn_questions
    each = count(candidates, settings.window, settings.shifts)
    return (
        f"Mode {settings.mode}: at most {each:,} questions of up to {settings.window} candidates a query, "
        f"{each * queries:,} in all."
    )


def check_scores(query: Query, candidates: Sequence[ImageRecord], values: npt.ArrayLike) -> ScoreArray:
    """Return a scorer's values as float32 (K,), refusing a wrong number of them and NaN."""
    scores = np.asarray(values, dtype=np.float32)
    if scores.shape != (len(candidates),):
        raise UpstreamError(
            f"The scorer gave {scores.shape} scores for {len(candidates)} candidates of {query.label}."
        )
    if not np.isfinite(scores).all():
        wrong = candidates[int(np.flatnonzero(~np.isfinite(scores))[0])]
        raise UpstreamError(
            f"The scorer gave a NaN or infinite score for query {query.label} and {wrong.path}. "
            "The checkpoint is damaged, or its dtype overflows: try dtype=float32."
        )
    return scores

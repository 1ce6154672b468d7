"""How the model is asked about a query's candidates: pair by pair, by choice or in turns, in the words of training.

The questions come from the task table of training (``tasks.py``), and every backend asks these. A prompt is the user's
message cut at its images: ``segments[0] image segments[1] image ... segments[n]``. Query images come first, then the
candidates.

``choice`` and ``turns`` ask which of several lettered candidates is the one. A model favours some letters whatever
they show, so each window may be asked in several cyclic shifts of its order, and the answers are averaged
(``shifts``).
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..archives import FloatArray, ScoreArray
from ..datasets.benchmark import Query
from ..datasets.registry import list_benchmarks
from ..errors import ConfigError, UpstreamError
from ..records import Answer, Attribute, ImageRecord, ImageReference, Instruction
from ..tasks import ASKED, IMAGE_MARK, TASKS, get_task, render_prompt
from .backends.base import Confidence, Scorer
from .settings import ScoringSettings


# What a pair of query and candidate is asked with. Stage 3 trains all four, so that nothing untrained is asked.
IMAGE_PAIR = "image_to_image_one_to_one"
TEXT_PAIR = "text_to_image_one_to_one"
ATTRIBUTE_PAIR = "attribute_one_to_one"
MULTIMODAL_PAIR = "multimodal_one_to_one"
PAIR_TASKS = (IMAGE_PAIR, TEXT_PAIR, ATTRIBUTE_PAIR, MULTIMODAL_PAIR)
SHOWS_QUERY = (IMAGE_PAIR, MULTIMODAL_PAIR)
SMALLEST_SPREAD = 1e-6  # relative; fp32 scores that differ by less are one number

# The candidate that is in every window.
ANCHOR = 0

# Windows of candidates, each a list of positions that are lettered in this order -> for each window its N scores.
Choose = Callable[[Sequence[Sequence[int]]], Sequence[npt.ArrayLike]]


def score_query(
    scoring: ScoringSettings, benchmark: str, scorer: Scorer, query: Query, candidates: Sequence[ImageRecord]
) -> ScoreArray:
    """Return the scores (K,) of a query's candidates in the mode of the settings; their order is the ranking.

    ``pointwise``: the margin of Yes over No for each candidate (paper section 4.1, response confidence); of a query
    with image and words see ``combine_margins``. Otherwise see ``choose_in_windows`` and ``choose_in_turns``.

    Raises:
        ConfigError: the query cannot be asked in this mode.
        UpstreamError: the scorer gave other than one finite number a candidate.
    """
    if not candidates:
        return np.empty(0, dtype=np.float32)
    if scoring.mode == "pointwise":
        tasks = list_pair_tasks(query, scoring.text_weight is not None)
        if not tasks:
            raise ConfigError(f"Query {query.query_id} has neither an image nor words; there is nothing to ask.")
        margins = [check_scores(query, candidates, scorer.score_pairs(query, candidates, task)) for task in tasks]
        return margins[0] if len(margins) == 1 else combine_margins(margins[0], margins[1], scoring.text_weight)
    task = pick_choice_task(scoring, benchmark, query)

    def choose(windows: Sequence[Sequence[int]]) -> list[ScoreArray]:
        lettered = [[candidates[position] for position in window] for window in windows]
        answers = scorer.choose(query, lettered, task)
        return [check_scores(query, window, values) for window, values in zip(lettered, answers, strict=True)]

    ask = choose_in_windows if scoring.mode == "choice" else choose_in_turns
    scores = ask(choose, len(candidates), scoring.window, scoring.shifts, query.query_id, scoring.seed)
    return scores.astype(np.float32)


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
            "The checkpoint is damaged, or its dtype overflows: try model.dtype=float32."
        )
    return scores


def list_pair_tasks(query: Query, separately: bool = False) -> list[str]:
    """Return the yes/no questions that are asked of the query and one candidate; several are combined.

    Args:
        query: what is searched for.
        separately: ask about an image and its text in two questions instead of one. Attributes beside an image are
            always a question of their own: the words of a multimodal question are sentences in training.
    """
    if can_ask(query, MULTIMODAL_PAIR) and not separately:
        return [MULTIMODAL_PAIR]
    words = TEXT_PAIR if query.text else ATTRIBUTE_PAIR
    return [task for task in (IMAGE_PAIR, words) if can_ask(query, task)]


def can_ask(query: Query, task: str) -> bool:
    """Return whether a query has what a yes/no task asks with."""
    needs = {
        IMAGE_PAIR: query.image is not None,
        TEXT_PAIR: bool(query.text),
        ATTRIBUTE_PAIR: bool(query.attributes),
        MULTIMODAL_PAIR: query.image is not None and bool(query.text),
    }
    return needs.get(task, False)


def combine_margins(
    image_margins: ScoreArray, text_margins: ScoreArray, text_weight: float | None = None
) -> ScoreArray:
    """Return image + text_weight * text (None: 1), each standardised over the query's candidates, (K,).

    The adaptive multi-modal query (paper section 4.2). Standardised, since one question may be answered with larger
    margins than the other; a question whose answers do not differ says nothing and adds nothing.
    """
    weight = 1.0 if text_weight is None else text_weight
    return (standardise(image_margins) + weight * standardise(text_margins)).astype(np.float32)


def standardise(scores: npt.NDArray[Any]) -> FloatArray:
    """Return scores (K,) with mean 0 and standard deviation 1; zeros where they are all (nearly) equal."""
    values = np.asarray(scores, dtype=np.float64)
    centred = values - values.mean()
    spread = float(centred.std())
    if spread <= SMALLEST_SPREAD * max(1.0, float(np.abs(values).max())):
        return np.zeros_like(centred)
    return centred / spread


def pick_choice_task(scoring: ScoringSettings, benchmark: str, query: Query) -> str:
    """Return the question of ``choice`` and ``turns``: ``choice_task``, or what fits the query and the benchmark."""
    if scoring.choice_task is not None:
        return scoring.choice_task
    if query.image is not None and query.words:
        return "multimodal_retrieval"
    if query.image is None:
        return "text_to_image_reid" if query.text else "attribute_retrieval"
    return list_benchmarks()[benchmark].choice_task


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's message: ``segments`` of text with one image between each two neighbours."""

    segments: tuple[str, ...]

    @property
    def image_count(self) -> int:
        """How many images it has."""
        return len(self.segments) - 1


def build_pair_prompt(query: Query, task: str) -> Prompt:
    """Return the yes/no question on one candidate, in the wording of the paper (the task's first).

    Args:
        query: what is searched for.
        task: one of ``PAIR_TASKS``; those of ``SHOWS_QUERY`` have two images, the query's and the candidate's.

    Raises:
        ConfigError: no yes/no task, or the query lacks what the task asks with.
    """
    if get_task(task).answer_kind != "match":
        raise ConfigError(f"{task} has no yes/no answer; pairs are scored with {', '.join(PAIR_TASKS)}.")
    if not can_ask(query, task):
        raise ConfigError(f"Task {task} cannot be asked of query {query.query_id}, which lacks an image or the words.")
    images = 2 if task in SHOWS_QUERY else 1
    captions = (query.text,) if task in (TEXT_PAIR, MULTIMODAL_PAIR) else ()
    return _cut(_ask(query, task, images, query_images=images, captions=captions))


def build_choice_prompt(query: Query, task: str, count: int) -> Prompt:
    """Return the question which of ``count`` lettered candidates match (images: the query's, then the candidates).

    Args:
        query: what is searched for.
        task: one whose answer names letters, e.g. ``standard_reid``.
        count: 1 to 26 candidates.

    Raises:
        ConfigError: the task's answer is no letter.
        DataError: more candidates than letters, or the query lacks what the task asks with.
    """
    if get_task(task).answer_kind != "letters":
        raise ConfigError(f"{task} does not choose among lettered images; mode: choice needs a task that does.")
    own = 1 if "{image}" in get_task(task).prompts[0] else 0
    captions = (query.words,) if "{caption}" in get_task(task).prompts[0] else ()
    return _cut(_ask(query, task, own + count, query_images=own, captions=captions))


def _ask(query: Query, task: str, images: int, query_images: int, captions: tuple[str, ...]) -> Instruction:
    attributes = tuple(Attribute(ASKED, name, value) for name, value in query.attributes.items())
    references = (ImageReference(""),) * images
    return Instruction(query.query_id, task, references, query_images, Answer(), captions, attributes)


def _cut(record: Instruction) -> Prompt:
    return Prompt(tuple(render_prompt(record).split(IMAGE_MARK)))


def choose_in_windows(choose: Choose, count: int, size: int, shifts: int, query_id: str, seed: int) -> FloatArray:
    """Return comparable scores (K,) of candidates that are asked about in windows of at most ``size``.

    The letters' first-token probabilities order a whole window in one pass (FIRST, Reddy et al., arXiv 2406.15657).
    Windows are made comparable by an anchor: candidate 0 is in every window, and each score is log P(candidate) -
    log P(anchor). Under Luce's choice axiom ("Individual Choice Behavior", 1959) that difference does not depend on
    who else is in the window. The others are in one window each. The anchor is the baseline's best where a filter
    orders the candidates; without a filter, or in a benchmark of trials, whose candidates are joined, it is the
    first in gallery order. Its letter is drawn for each window: always A, a model that likes A would put the anchor
    above all others, and the baseline's Rank-1 would come out as the model's.
    """
    scores = np.zeros(count)
    windows = draw_windows(range(1, count), size - 1, query_id, seed)
    letters = _make_generator(query_id, seed + 1).integers(0, size, len(windows)).tolist()
    for window, letter in zip(windows, letters, strict=True):
        window.insert(letter % (len(window) + 1), ANCHOR)
    for window, answers in zip(windows, ask_windows(choose, windows, shifts), strict=True):
        scores[window] = answers - answers[window.index(ANCHOR)]
    return scores


def choose_in_turns(choose: Choose, count: int, size: int, shifts: int, query_id: str, seed: int) -> FloatArray:
    """Return scores (K,) that count down in the order in which candidates win: ask, remove the winner, ask again.

    The paper's multi-turn choice with removal. More candidates than ``size`` play as a tournament: the winners of the
    windows meet in windows of winners; after a removal only the windows that changed are asked again.
    """
    known: dict[tuple[int, ...], int] = {}

    def find_winners(windows: Sequence[tuple[int, ...]]) -> list[int]:
        new = [window for window in windows if window not in known]
        for window, answers in zip(new, ask_windows(choose, new, shifts), strict=True):
            known[window] = window[int(np.argmax(answers))]
        return [known[window] for window in windows]

    windows = draw_windows(range(count), size, query_id, seed)
    scores = np.zeros(count)
    for place in range(count):
        winners = find_winners([tuple(window) for window in windows if window])
        while len(winners) > 1:
            winners = find_winners([tuple(winners[start : start + size]) for start in range(0, len(winners), size)])
        scores[winners[0]] = count - place
        for window in windows:
            if winners[0] in window:
                window.remove(winners[0])
    return scores


def ask_windows(choose: Choose, windows: Sequence[Sequence[int]], shifts: int) -> list[FloatArray]:
    """Return each window's log-probabilities of being chosen (N,), means over cyclic shifts of the letters.

    All questions go out at once: a GPU takes several in a batch, a server several at a time.
    """
    orders = [_list_orders(len(window), shifts) for window in windows]
    questions = [
        [window[place] for place in order] for window, own in zip(windows, orders, strict=True) for order in own
    ]
    replies = iter(choose(questions) if questions else ())
    answers: list[FloatArray] = []
    for window, own in zip(windows, orders, strict=True):
        total = np.zeros(len(window))
        for order in own:
            total[order] += take_log_softmax(next(replies))
        answers.append(total / max(len(own), 1))
    return answers


def _list_orders(count: int, shifts: int) -> list[list[int]]:
    """Return the cyclic shifts in which a window is asked; one candidate alone needs no question."""
    rounds = min(shifts, count) if count > 1 else 0
    return [[(place + number * count // rounds) % count for place in range(count)] for number in range(rounds)]


def take_log_softmax(scores: npt.ArrayLike) -> FloatArray:
    """Return log-probabilities (N,) of scores (N,), the letters' logits; they are finite where the scores are."""
    values = np.asarray(scores, dtype=np.float64)
    values = values - values.max()
    return values - np.log(np.exp(values).sum())


def draw_windows(positions: Sequence[int], size: int, query_id: str, seed: int) -> list[list[int]]:
    """Share positions out at random into windows of at most ``size``, none overlapping, of nearly equal lengths.

    The draw depends on the seed and the query alone, so that a resumed evaluation asks the same questions.
    """
    if not positions:
        return []
    drawn = _make_generator(query_id, seed).permutation(np.asarray(positions))
    parts: list[list[int]] = [part.tolist() for part in np.array_split(drawn, -(-len(positions) // size))]
    return parts


def _make_generator(query_id: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(query_id.encode())])


def name_scores(scoring: ScoringSettings, queries: Sequence[Query], confidence: Confidence) -> Confidence:
    """Return what the mode's scores of these queries are, made of what the scorer gives.

    Weaker sources keep their name in any mode.
    """
    if confidence not in ("margins", "similarities"):
        return confidence
    if scoring.mode != "pointwise":
        return "log_odds" if scoring.mode == "choice" else "order"
    separately = scoring.text_weight is not None
    return "standardised" if any(len(list_pair_tasks(query, separately)) > 1 for query in queries) else confidence


def describe_mode(scoring: ScoringSettings, benchmark: str) -> dict[str, Any]:
    """Return what of the mode changes scores, for the store's fingerprint."""
    if scoring.mode == "pointwise":
        return {"mode": scoring.mode, "text_weight": scoring.text_weight}
    keys = ("mode", "window", "shifts", "seed", "choice_task")
    prompts = {name: task.prompts[0] for name, task in TASKS.items() if task.answer_kind == "letters"}
    return {key: getattr(scoring, key) for key in keys} | {"benchmark": benchmark, "choice_prompts": prompts}


def describe_cost(scoring: ScoringSettings, candidates: int, queries: int) -> str:
    """Say how many questions at most a mode asks of the model."""
    if scoring.mode == "pointwise":
        return (
            f"Mode pointwise: at most {candidates:,} candidates a query, one question each, or two where an image and "
            "words ask separately."
        )
    count = count_window_questions if scoring.mode == "choice" else count_turn_questions
    each = count(candidates, scoring.window, scoring.shifts)
    return (
        f"Mode {scoring.mode}: at most {each:,} questions of up to {scoring.window} candidates a query, "
        f"{each * queries:,} in all."
    )


def count_window_questions(count: int, size: int, shifts: int) -> int:
    """Return how many questions ``choose_in_windows`` asks at most."""
    return -(-max(count - 1, 0) // (size - 1)) * shifts


def count_turn_questions(count: int, size: int, shifts: int) -> int:
    """Return how many questions ``choose_in_turns`` asks at most: first all windows, then one path a removal."""
    levels: list[int] = []
    windows = count
    while windows > 1:
        windows = -(-windows // size)
        levels.append(windows)
    return (sum(levels) + max(count - 2, 0) * len(levels)) * shifts

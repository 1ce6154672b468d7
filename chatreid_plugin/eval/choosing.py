"""Ask which of several lettered candidates is the one: in one pass per window, or turn by turn; used by ``modes``.

A model favours some letters whatever they show, so each window may be asked in several cyclic shifts of its order, and
the answers are averaged (``shifts``).
"""

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .ties import FloatArray


Choose = Callable[[Sequence[int]], npt.ArrayLike]  # positions of N candidates, lettered in this order -> N scores
Window = tuple[int, ...]
Question = TypeVar("Question")
Reply = TypeVar("Reply")


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
    drawn = np.random.default_rng([seed, zlib.crc32(query_id.encode())]).permutation(np.asarray(positions))
    parts: list[list[int]] = [part.tolist() for part in np.array_split(drawn, -(-len(positions) // size))]
    return parts


def ask_window(choose: Choose, window: Sequence[int], shifts: int) -> FloatArray:
    """Return each candidate's log-probability of being chosen (N,), the mean over cyclic shifts of the letters."""
    count = len(window)
    if count == 1:
        return np.zeros(1)
    total = np.zeros(count)
    rounds = min(shifts, count)
    for number in range(rounds):
        offset = number * count // rounds
        order = (np.arange(count) + offset) % count
        total[order] += take_log_softmax(choose([window[place] for place in order.tolist()]))
    return total / rounds


def ask_all(ask: Callable[[Question], Reply], questions: Sequence[Question], at_once: int) -> list[Reply]:
    """Return the replies to independent questions, so many ``at_once``: a server takes several."""
    if at_once == 1 or len(questions) < 2:
        return [ask(question) for question in questions]
    with ThreadPoolExecutor(min(at_once, len(questions))) as pool:
        return list(pool.map(ask, questions))


def choose_in_windows(
    choose: Choose, count: int, size: int, shifts: int, query_id: str, seed: int, at_once: int = 1
) -> FloatArray:
    """Return comparable scores (K,) of candidates that are asked about in windows of at most ``size``.

    The letters' first-token probabilities order a whole window in one pass (FIRST, Reddy et al., arXiv 2406.15657).
    Windows are made comparable by an anchor: candidate 0 is in every window, and each score is log P(candidate) -
    log P(anchor). Under Luce's choice axiom ("Individual Choice Behavior", 1959) that difference does not depend on
    who else is in the window. The others are in one window each. The anchor is the baseline's best where a filter
    orders the candidates of a single trial; without a filter, or with several trials, whose candidates are joined, it
    is the first in gallery order.
    """
    scores = np.zeros(count)
    windows = draw_windows(range(1, count), size - 1, query_id, seed)
    replies = ask_all(lambda window: ask_window(choose, [0, *window], shifts), windows, at_once)
    for window, answers in zip(windows, replies, strict=True):
        scores[window] = answers[1:] - answers[0]
    return scores


def choose_in_turns(
    choose: Choose, count: int, size: int, shifts: int, query_id: str, seed: int, at_once: int = 1
) -> FloatArray:
    """Return scores (K,) that count down in the order in which candidates win: ask, remove the winner, ask again.

    The paper's multi-turn choice with removal. More candidates than ``size`` play as a tournament: the winners of the
    windows meet in windows of winners; after a removal only the windows that changed are asked again.
    """
    asked: dict[Window, int] = {}

    def find_winner(window: Window) -> int:
        if window not in asked:
            asked[window] = window[int(np.argmax(ask_window(choose, window, shifts)))]
        return asked[window]

    windows = draw_windows(range(count), size, query_id, seed)
    scores = np.zeros(count)
    for place in range(count):
        winners = ask_all(find_winner, [tuple(window) for window in windows if window], at_once)
        while len(winners) > 1:
            groups = [tuple(winners[start : start + size]) for start in range(0, len(winners), size)]
            winners = ask_all(find_winner, groups, at_once)
        scores[winners[0]] = count - place
        for window in windows:
            if winners[0] in window:
                window.remove(winners[0])
    return scores


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

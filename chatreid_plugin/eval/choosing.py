"""Ask which of several lettered candidates is the one: in one pass per window, or turn by turn; used by ``modes``.

A model favours some letters whatever they show, so each window may be asked in several cyclic shifts of its order, and
the answers are averaged (``shifts``).
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .arrays import FloatArray


# Windows of candidates, each a list of positions that are lettered in this order -> for each window its N scores.
Choose = Callable[[Sequence[Sequence[int]]], Sequence[npt.ArrayLike]]

# The candidate that is in every window.
ANCHOR = 0


def take_log_softmax(scores: npt.ArrayLike) -> FloatArray:
    """Return log-probabilities (N,) of scores (N,), the letters' logits; they are finite where the scores are."""
    values = np.asarray(scores, dtype=np.float64)
    values = values - values.max()
    return values - np.log(np.exp(values).sum())


def _make_generator(query_id: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(query_id.encode())])


def draw_windows(positions: Sequence[int], size: int, query_id: str, seed: int) -> list[list[int]]:
    """Share positions out at random into windows of at most ``size``, none overlapping, of nearly equal lengths.

    The draw depends on the seed and the query alone, so that a resumed evaluation asks the same questions.
    """
    if not positions:
        return []
    drawn = _make_generator(query_id, seed).permutation(np.asarray(positions))
    parts: list[list[int]] = [part.tolist() for part in np.array_split(drawn, -(-len(positions) // size))]
    return parts


def _list_orders(count: int, shifts: int) -> list[list[int]]:
    """Return the cyclic shifts in which a window is asked; one candidate alone needs no question."""
    rounds = min(shifts, count) if count > 1 else 0
    return [[(place + number * count // rounds) % count for place in range(count)] for number in range(rounds)]


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


def choose_in_windows(choose: Choose, count: int, size: int, shifts: int, query_id: str, seed: int) -> FloatArray:
    """Return comparable scores (K,) of candidates that are asked about in windows of at most ``size``.

    The letters' first-token probabilities order a whole window in one pass (FIRST, Reddy et al., arXiv 2406.15657).
    Windows are made comparable by an anchor: candidate 0 is in every window, and each score is log P(candidate) -
    log P(anchor). Under Luce's choice axiom ("Individual Choice Behavior", 1959) that difference does not depend on
    who else is in the window. The others are in one window each. The anchor is the baseline's best where a filter
    orders the candidates; without a filter, or in a protocol of trials, whose candidates are joined, it is the
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

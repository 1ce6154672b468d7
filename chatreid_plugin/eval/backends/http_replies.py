"""What a chat completion says about a question: log-probabilities of its first token, or its text."""

import math
import unicodedata
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from ...answers import read_answer
from ...servers.answers import BrokenAnswer
from ...tasks import NO, YES


# How often a question is asked whose answers cannot be read, e.g. JSON cut short.
READINGS = 3
# What vLLM writes for minus infinity, which JSON has not.
LOWEST = -9999.0
# Nothing that a model says is larger; differences of such numbers are finite in float32.
HIGHEST = 1e30
# How SentencePiece and byte-level BPE write the space before a word, when a server gives raw tokens.
_SPACES = " \u2581\u0120"
# What a reply counts that is neither Yes nor No: half a vote.
UNREADABLE_VOTE = 0.5

Reading = TypeVar("Reading")


@dataclass(frozen=True, slots=True)
class Value:
    """A number read from replies, and how many of its parts were missing and had to be filled in."""

    number: float
    filled: int = 0


async def read_again(ask: Callable[[], Awaitable[Reading]]) -> Reading:
    """Return what ``ask`` returns, asking anew while its answer cannot be read.

    Raises:
        BrokenAnswer: ``READINGS`` answers could not be read.
    """
    for _ in range(READINGS - 1):
        try:
            return await ask()
        except BrokenAnswer:
            continue
    return await ask()


def read_number(value: Any) -> float:
    """Return a number of JSON, which may be a whole number too large for any float: that is infinite.

    Raises:
        TypeError: it is a list or the like.
        ValueError: it is a text of something else.
    """
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _read_choices(body: object) -> list[dict[str, Any]]:
    found = cast(dict[str, Any], body).get("choices") if isinstance(body, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(choice, dict) for choice in found):
        raise BrokenAnswer(f"no chat completion: {' '.join(str(body).split())[:120]}")
    return cast(list[dict[str, Any]], found)


def read_texts(body: object) -> list[str]:
    """Return the text of every choice.

    Raises:
        BrokenAnswer: no chat completion.
    """
    texts: list[str] = []
    for choice in _read_choices(body):
        message = choice.get("message")
        content = cast(dict[str, Any], message).get("content") if isinstance(message, dict) else None
        texts.append(content if isinstance(content, str) else "")
    return texts


def read_logprobs(body: object) -> dict[str, float]:
    """Return the log-probabilities of the first answer token's best alternatives; empty if the reply has none.

    Tokens are given without the space before them; of two spellings the likelier one counts.

    Raises:
        BrokenAnswer: no chat completion.
    """
    best: dict[str, float] = {}
    try:
        entries = cast(Any, _read_choices(body)[0])["logprobs"]["content"][0]["top_logprobs"]
        for entry in entries:
            token, value = str(entry["token"]), read_number(entry["logprob"])
            if math.isnan(value) or value > HIGHEST:
                raise BrokenAnswer("a log-probability is no number")
            token = unicodedata.normalize("NFC", token).strip(_SPACES)
            best[token] = max(value, best.get(token, LOWEST))  # minus infinity becomes LOWEST
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return {}
    return best


def compute_margin(best: Mapping[str, float]) -> Value:
    """Return log P(Yes) - log P(No) of read_logprobs; a missing word counts as the least likely one returned.

    Raises:
        BrokenAnswer: no log-probabilities.
    """
    if not best:
        raise BrokenAnswer("its answer has no log-probabilities")
    least = min(best.values())
    missing = sum(word not in best for word in (YES, NO))
    return Value(best.get(YES, least) - best.get(NO, least), missing)


def compute_letters(best: Mapping[str, float], letters: Sequence[str]) -> tuple[list[float], int]:
    """Return the log-probability of each letter, and how many were missing and count as the least likely returned.

    Raises:
        BrokenAnswer: no log-probabilities.
    """
    if not best:
        raise BrokenAnswer("its answer has no log-probabilities")
    least = min(best.values())
    return [best.get(letter, least) for letter in letters], sum(letter not in best for letter in letters)


def count_votes(task: str, texts: Sequence[str]) -> Value:
    """Return the share of texts that say Yes; one that says neither is half a vote and counted as filled in."""
    found = [read_answer(task, text).match for text in texts]
    votes = [UNREADABLE_VOTE if match is None else float(match) for match in found]
    return Value(sum(votes) / len(votes), sum(match is None for match in found))


def count_letter_votes(task: str, texts: Sequence[str], options: int) -> tuple[list[float], int]:
    """Return for each option the share of texts that name it, and how many texts name none."""
    found = [read_answer(task, text, options).indices for text in texts]
    shares = [sum(option in indices for indices in found) / len(found) for option in range(options)]
    return shares, sum(not indices for indices in found)

"""What servers of OpenAI's kind answer, as models; JSON of which no number, text or depth surprises anybody later."""

import json
import re
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator


# Tokens of one request; more is a server's mistake, and would hold back all others.
_MOST_USED = 10_000_000
_MOST_DIGITS = 20
_MOST_DEPTH = 64
# Halves of a character, which no UTF-8 file can hold.
_SURROGATE = re.compile("[\ud800-\udfff]")


class BrokenAnswer(Exception):
    """An answer came, but it cannot be read: no JSON, none that can be kept, or not what was asked for."""


def _forgive(value: object, read: ValidatorFunctionWrapHandler) -> object:
    try:
        return read(value)
    except ValidationError:
        return None


# What servers leave out or write in ways of their own; whoever needs it says what is missing.
Text = Annotated[str | None, WrapValidator(_forgive)]


class Message(BaseModel):
    """A model's reply, or why it declines."""

    content: Text = None
    refusal: Text = None


class Alternative(BaseModel):
    """A token that the model could have begun its reply with."""

    token: str
    logprob: float


class Position(BaseModel):
    """The alternatives of one token."""

    top_logprobs: list[Alternative]


class Logprobs(BaseModel):
    """The alternatives of all tokens of a reply."""

    content: Annotated[list[Position], Field(min_length=1)]


class Choice(BaseModel):
    """One of the replies to a question."""

    message: Annotated[Message | None, WrapValidator(_forgive)] = None
    logprobs: Annotated[Logprobs | None, WrapValidator(_forgive)] = None


class Completion(BaseModel):
    """The answer of ``/chat/completions``, as far as anybody reads it."""

    choices: Annotated[list[Choice], Field(min_length=1)]


class ListedModel(BaseModel):
    """A server's model; ``chatreid`` is what `chatreid serve` says of itself."""

    id: str
    chatreid: Annotated[dict[str, Any] | None, WrapValidator(_forgive)] = None


class ModelList(BaseModel):
    """The answer of ``/models``."""

    data: list[ListedModel]


class Usage(BaseModel):
    """What a request took, as the server counts."""

    prompt_tokens: Annotated[int, Field(ge=0, le=_MOST_USED)] = 0
    completion_tokens: Annotated[int, Field(ge=0, le=_MOST_USED)] = 0


Answer = TypeVar("Answer", bound=BaseModel)


def read_as(kind: type[Answer], value: object, name: str = "chat completion") -> Answer:
    """Return decoded JSON as a model.

    Raises:
        BrokenAnswer: it does not fit.
    """
    try:
        return kind.model_validate(value)
    except ValidationError:
        raise BrokenAnswer(f"no {name}: {' '.join(str(value).split())[:120]}") from None


def parse_answer(content: bytes, key: str = "") -> object:
    """Return decoded JSON.

    Raises:
        BrokenAnswer: it is none, or see ``check_value``.
    """
    try:
        value = json.loads(content.decode("utf-8"), parse_int=_read_integer)
    except (ValueError, RecursionError) as error:
        start = " ".join(content[:120].decode("utf-8", "replace").split())
        raise BrokenAnswer(f"broken JSON: {error}: {start}") from None
    return check_value(value, key)


def _read_integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def check_value(value: object, key: str = "", depth: int = 0) -> object:
    """Return decoded JSON with ``key`` replaced in its texts, should the server repeat it; names and numbers stay.

    Raises:
        BrokenAnswer: half a character, which cannot be written again, or lists in lists without end.
    """
    if depth > _MOST_DEPTH:
        raise BrokenAnswer("the answer is nested too deeply")
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise BrokenAnswer("a text holds half a character")
        return value.replace(key, "[key]") if key else value
    if isinstance(value, list):
        return [check_value(part, key, depth + 1) for part in cast(list[object], value)]
    if isinstance(value, dict):
        parts = cast(dict[str, object], value).items()
        return {check_value(name): check_value(part, key, depth + 1) for name, part in parts}
    return value

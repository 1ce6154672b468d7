"""What a request may hold; everything else is refused with a reason, in the error format of OpenAI's API."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


# Answers are a word or a list of attributes; OpenAI's limit on alternatives.
MOST_TOKENS = 1024
USUAL_TOKENS = 256
MOST_ALTERNATIVES = 20
# Of one body, by its commas and brackets: two bytes of JSON can become a hundred of Python.
MOST_VALUES = 50_000
# A greedy answer is the same with and without them.
WITHOUT_EFFECT = ("seed", "top_p", "user")
# What says the same as leaving a parameter out.
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_ZERO_IS_NONE = ("frequency_penalty", "presence_penalty")
# A message may repeat what it was sent.
_LONGEST_MESSAGE = 1000
_SHOWN_FAULTS = 10


class RequestFault(Exception):
    """A request that cannot be answered as it is.

    Attributes:
        status: HTTP status, 4xx or 503.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def describe_fault(message: str, status: int) -> dict[str, Any]:
    """Return the body of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message[:_LONGEST_MESSAGE], "type": kind, "param": None, "code": None}}


class Body(BaseModel):
    """A part of a request: unknown parameters are refused by name, unless they say nothing (``tools: []``)."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _refuse_unknown(self) -> "Body":
        unknown = [name for name, value in (self.model_extra or {}).items() if not _says_nothing(name, value)]
        if unknown:
            it = "it" if len(unknown) == 1 else "them"
            raise ValueError(f"this server does not know {', '.join(unknown)}; leave {it} out")
        return self


def _says_nothing(name: str, value: object) -> bool:
    return value in _EMPTY or name in WITHOUT_EFFECT or (name in _ZERO_IS_NONE and value == 0)


class ImageUrl(Body):
    """A picture, as a data URL; the image policy decides on its size, whatever ``detail`` says."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class Part(Body):
    """A piece of a message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(Body):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class ChatRequest(Body):
    """Body of POST /v1/chat/completions; ``prepared`` says that pictures have been through the image policy."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: float | None = None
    n: int | None = None
    stream: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    prepared: bool = False

    @property
    def token_limit(self) -> int:
        """How many tokens the answer may have."""
        return self.max_completion_tokens or self.max_tokens or USUAL_TOKENS

    def check(self) -> None:
        """Refuse what this server cannot do rather than leave it out in silence.

        Raises:
            RequestFault: says what, and what to send instead.
        """
        if self.stream:
            raise RequestFault("This server does not stream; send stream: false.")
        if self.temperature:
            raise RequestFault("This server answers greedily; send temperature: 0, or leave it out.")
        if self.n not in (None, 1):
            raise RequestFault("This server gives one answer; send n: 1. Greedy answers would all be the same.")
        if self.top_logprobs and not self.logprobs:
            raise RequestFault("top_logprobs needs logprobs: true.")
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise RequestFault("This server gives text alone; leave response_format out.")


class ScoreQuery(Body):
    """What is searched for: a picture (data URL), a text, attributes."""

    image: str | None = None
    text: str = ""
    attributes: dict[str, str] = {}


class ScoreRequest(Body):
    """Body of POST /v1/score."""

    model: str | None = None
    query: ScoreQuery
    candidates: Annotated[list[str], Field(min_length=1)]
    task: str = "image_to_image_one_to_one"
    prepared: bool = False


BodyType = TypeVar("BodyType", bound=Body)


def parse_body(content: bytearray, kind: type[BodyType]) -> BodyType:
    """Return the checked body.

    Raises:
        RequestFault: not JSON, of too many parts, or not what the path takes.
    """
    values = sum(content.count(mark) for mark in (b",", b"[", b"{"))
    if values > MOST_VALUES:
        raise RequestFault(f"The request has {values} values; {MOST_VALUES} is most.", 413)
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[:_SHOWN_FAULTS]
        faults = [(".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")) for fault in found]
        raise RequestFault("; ".join(f"{place or 'body'}: {what}" for place, what in faults)) from None

"""What a request may hold; everything else is refused with a reason, in the error format of OpenAI's API."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field


# Answers are a word or a list of attributes; OpenAI's limit on alternatives.
MOST_TOKENS = 1024
USUAL_TOKENS = 256
MOST_ALTERNATIVES = 20


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
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class ImageUrl(BaseModel):
    """A picture, as a data URL."""

    url: str


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(BaseModel):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions; ``prepared`` says that pictures have been through the image policy."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: float | None = None
    n: int | None = None
    stream: bool | None = None
    stop: str | list[str] | None = None
    tools: list[Any] | None = None
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
        for field in ("stop", "tools"):
            if getattr(self, field):
                raise RequestFault(f"This server does not know {field}; leave it out.")
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise RequestFault("This server gives text alone; leave response_format out.")


class ScoreQuery(BaseModel):
    """What is searched for: a picture (data URL), a text, attributes."""

    image: str | None = None
    text: str = ""
    attributes: dict[str, str] = {}


class ScoreRequest(BaseModel):
    """Body of POST /v1/score."""

    model: str | None = None
    query: ScoreQuery
    candidates: Annotated[list[str], Field(min_length=1)]
    task: str = "image_to_image_one_to_one"
    prepared: bool = False

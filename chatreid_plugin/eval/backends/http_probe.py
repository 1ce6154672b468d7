"""What a server can give, found out by asking it once; the answer decides what the scores are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from PIL import Image

from ...crops import encode_picture
from ...errors import ConfigError, UpstreamError
from ...servers.answers import BrokenAnswer
from ...servers.client import RejectedRequest, ServerClient, TemporaryFailure
from .http_replies import read_again, read_logprobs, read_texts


# OpenAI's limit, and the lower one of some servers.
TOP_LOGPROBS = (20, 5)
QUESTION = "Which season comes after winter? Answer with one word."
_PROBE_SIZE = (64, 128)


class _NoLogprobs(BrokenAnswer):
    """A chat completion without log-probabilities."""


@dataclass(frozen=True, slots=True)
class ServerTraits:
    """What a server gives.

    Attributes:
        model: name under which it is asked.
        gives: log-probabilities of the first token's best alternatives, or answers alone. Whether Yes and No are
            always among the best is seen only while scoring (``Scorer.filled``).
        top_logprobs: how many alternatives it returns.
        several_choices: whether one request can give several sampled answers (``n``).
        own: what `chatreid serve` says of itself; empty for any other server.
    """

    model: str
    gives: Literal["logprobs", "answers"]
    top_logprobs: int = 0
    several_choices: bool = False
    own: Mapping[str, Any] | None = None


def make_body(
    model: str, parts: list[dict[str, Any]], extra: Mapping[str, Any], system: str | None = None, **changes: Any
) -> dict[str, Any]:
    """Return the body of a chat completion; ``extra`` may replace all but the model and the messages."""
    before: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages = [*before, {"role": "user", "content": parts}]
    return {"max_tokens": 1, "temperature": 0} | changes | dict(extra) | {"model": model, "messages": messages}


def make_image_part(url: str) -> dict[str, Any]:
    """Return an image as a part of a message."""
    return {"type": "image_url", "image_url": {"url": url}}


async def probe_server(client: ServerClient, model: str | None, extra: Mapping[str, Any], votes: int) -> ServerTraits:
    """Return what the server gives.

    Args:
        client: the server.
        model: its name; None to take the only one the server has.
        extra: keys of every body.
        votes: how many sampled answers will be wanted of a server without log-probabilities.

    Raises:
        ConfigError: no model named, and the server has none or several.
        UpstreamError: it is out of reach, or refuses the key, the model or the whole request.
    """
    try:
        return await _probe(client, model, extra, votes)
    except TemporaryFailure as failure:
        raise UpstreamError(f"{client.host} does not answer: {failure}.") from None
    except BrokenAnswer as failure:
        raise UpstreamError(
            f"{client.host} gives no answer that can be read: {failure}. Check base_url; if it is right, run again."
        ) from None
    except RejectedRequest as failure:
        raise UpstreamError(
            f"{client.host} does not take our request ({failure}). Check model, base_url and extra_body; the model "
            "has to read images."
        ) from None


async def _probe(client: ServerClient, model: str | None, extra: Mapping[str, Any], votes: int) -> ServerTraits:
    listed = await _list_models(client, must=model is None)
    if model is None:
        if len(listed) != 1:
            names = ", ".join(listed) or "none"
            raise ConfigError(f"{client.host} does not have one model but {names}. Set `model` to one.")
        model = next(iter(listed))
    client.address = replace(client.address, model=model)
    own = listed.get(model, {}).get("chatreid")
    if isinstance(own, dict):
        return ServerTraits(model, "logprobs", own=cast(dict[str, Any], own))
    picture = make_image_part(encode_picture(Image.new("RGB", _PROBE_SIZE, "grey")))
    question = [picture, {"type": "text", "text": QUESTION}]
    for count in TOP_LOGPROBS:
        body = make_body(model, question, extra, logprobs=True, top_logprobs=count)
        try:
            await _ask_logprobs(client, body)
        except RejectedRequest:  # nothing else says that so many are too many
            continue
        except _NoLogprobs:
            break
        return ServerTraits(model, "logprobs", count)
    return ServerTraits(model, "answers", several_choices=await _try_answers(client, model, question, extra, votes))


async def _list_models(client: ServerClient, *, must: bool) -> dict[str, dict[str, Any]]:
    """Return name -> entry of the server's models; nothing where it keeps no list, unless it ``must`` tell."""

    async def ask() -> dict[str, dict[str, Any]]:
        answer = cast(Any, await client.ask("/models", None))
        try:
            return {str(entry["id"]): entry for entry in answer["data"]}
        except (KeyError, TypeError):
            raise BrokenAnswer("no list of models") from None

    try:
        return await read_again(ask)
    except (UpstreamError, RejectedRequest, BrokenAnswer) as failure:
        if must:
            raise ConfigError(
                f"{client.host} does not tell its models ({failure}). Set `model` if it keeps no list."
            ) from None
        return {}  # the next question gives the reason, if it is one


async def _ask_logprobs(client: ServerClient, body: dict[str, Any]) -> None:
    """Return if an answer has log-probabilities; one without may be a fault, and is asked for again as such."""

    async def ask() -> None:
        if not read_logprobs(await client.ask("/chat/completions", body)):
            raise _NoLogprobs

    await read_again(ask)


async def _try_answers(
    client: ServerClient, model: str, question: list[dict[str, Any]], extra: Mapping[str, Any], votes: int
) -> bool:
    """Ask for text; return whether several answers come at once."""

    async def count_texts(**changes: Any) -> int:
        body = make_body(model, question, extra, **changes)
        return len(await read_again(lambda: ask(body)))

    async def ask(body: dict[str, Any]) -> list[str]:
        return read_texts(await client.ask("/chat/completions", body))

    if votes > 1:
        try:
            return await count_texts(n=2, temperature=1.0) > 1
        except RejectedRequest:
            pass
    await count_texts()
    return False

"""What a server can give, found out by asking it once; the answer decides what the scores are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from PIL import Image

from ...crops import encode_picture
from ...errors import ConfigError, UpstreamError
from ...servers.client import BrokenAnswer, RejectedRequest, ServerClient, TemporaryFailure
from .http_replies import read_logprobs, read_texts


# OpenAI's limit, and the lower one of some servers.
TOP_LOGPROBS = (20, 5)
QUESTION = "Which season comes after winter? Answer with one word."
_PROBE_SIZE = (64, 128)


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


def make_body(model: str, parts: list[dict[str, Any]], extra: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the body of a chat completion; ``extra`` may replace all but the model and the message."""
    messages = [{"role": "user", "content": parts}]
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
    listed = await _list_models(client)
    if model is None:
        if len(listed) != 1:
            names = ", ".join(listed) or "none that it tells"
            raise ConfigError(f"{client.host} has several models or does not tell ({names}). Set `model` to one.")
        model = next(iter(listed))
    client.address = replace(client.address, model=model)
    own = listed.get(model, {}).get("chatreid")
    if isinstance(own, dict):
        return ServerTraits(model, "logprobs", own=cast(dict[str, Any], own))
    picture = make_image_part(encode_picture(Image.new("RGB", _PROBE_SIZE, "grey")))
    question = [picture, {"type": "text", "text": QUESTION}]
    for count in TOP_LOGPROBS:
        try:
            body = make_body(model, question, extra, logprobs=True, top_logprobs=count)
            best = read_logprobs(await client.ask("/chat/completions", body))
        except (RejectedRequest, TemporaryFailure, BrokenAnswer):
            continue
        if best:
            return ServerTraits(model, "logprobs", count)
        break
    return ServerTraits(model, "answers", several_choices=await _try_answers(client, model, question, extra, votes))


async def _list_models(client: ServerClient) -> dict[str, dict[str, Any]]:
    """Return name -> entry of the server's models; nothing where it keeps no list."""
    try:
        answer = cast(Any, await client.ask("/models", None))
        return {str(entry["id"]): entry for entry in answer["data"]}
    except TemporaryFailure as failure:
        raise UpstreamError(f"{client.host} does not answer: {failure}.") from None
    except (UpstreamError, RejectedRequest, BrokenAnswer, KeyError, TypeError):
        return {}  # the next question gives the reason, if it is one


async def _try_answers(
    client: ServerClient, model: str, question: list[dict[str, Any]], extra: Mapping[str, Any], votes: int
) -> bool:
    """Ask for text; return whether several answers come at once."""
    wanted = {"n": 2, "temperature": 1.0} if votes > 1 else {}
    for changes in (wanted, {}):
        try:
            return (
                len(read_texts(await client.ask("/chat/completions", make_body(model, question, extra, **changes))))
                > 1
            )
        except TemporaryFailure as failure:
            raise UpstreamError(f"{client.host} does not answer: {failure}.") from None
        except (RejectedRequest, BrokenAnswer) as failure:
            if not changes:
                raise UpstreamError(
                    f"{client.host} does not take our request ({failure}). Check model, base_url and extra_body; the "
                    "model has to read images."
                ) from None
    return False

"""Score with any OpenAI-compatible server: ``backend: http``.

A first question finds out what the server gives: log-probabilities of the first token's best alternatives, or answers
alone. Every pair is one request then, except with `chatreid serve`, which scores many pairs a request (``/v1/score``).
One query's pairs are asked together and show the query first, so that servers with a prefix cache compute it once.
"""

import logging
import math
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from ...answers import read_answer
from ...archives import ScoreArray
from ...datasets.benchmark import Query
from ...errors import ConfigError, UpstreamError
from ...openai_answers import BrokenAnswer, Completion, ListedModel, read_as
from ...openai_client import (
    FAILURES,
    OpenAIClient,
    RejectedRequest,
    Server,
    encode_grey_picture,
    is_local,
    make_image_part,
)
from ...pixels import encode_picture, open_crop, prepare_crop
from ...records import ImageRecord
from ...tasks import LETTERS, NO, YES
from ..questions import Prompt, build_choice_prompt, build_pair_prompt
from ..settings import ModelSettings, ServerSettings


# Candidates of one request to `chatreid serve`: even as noise, crops of the default 768x768 pixels fit.
SCORED_TOGETHER = 24
# Encoded images kept: those of one query's candidates are often the next one's, too.
KEPT_IMAGES = 1024
PAIR_TOKENS = 4
CHOICE_TOKENS = 64
# Keys of extra_body that name the tokens Yes and No, as vLLM has them: a choice answers with letters.
PAIR_KEYS = ("allowed_token_ids", "logprob_token_ids")
# OpenAI's limit, and the lower one of some servers.
TOP_LOGPROBS = (20, 5)
QUESTION = "Which season comes after winter? Answer with one word."
# What vLLM writes for minus infinity, which JSON has not.
LOWEST = -9999.0
# Nothing that a model says is larger; differences of such numbers are finite in float32.
HIGHEST = 1e30
# How SentencePiece and byte-level BPE write the space before a word, when a server gives raw tokens.
_SPACES = " \u2581\u0120"
# What a reply counts that is neither Yes nor No: half a vote.
UNREADABLE_VOTE = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerTraits:
    """What a server gives.

    Attributes:
        model: name under which it is asked.
        gives: log-probabilities of the first token's best alternatives, or answers alone. Whether Yes and No are
            always among the best is seen only while scoring (``HttpScorer.filled``).
        top_logprobs: how many alternatives it returns.
        several_choices: whether one request can give several sampled answers (``n``).
        own: what `chatreid serve` says of itself; None of any other server.
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


def probe_server(client: OpenAIClient, model: str | None, extra: Mapping[str, Any], votes: int) -> ServerTraits:
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
    listed = client.probe([lambda: _list_models(client, must=model is None)])
    if model is None:
        if len(listed) != 1:
            names = ", ".join(listed) or "none"
            raise ConfigError(f"{client.host} does not have one model but {names}. Set `model` to one.")
        model = next(iter(listed))
    client.model = name = model
    if name in listed and listed[name].chatreid is not None:
        return ServerTraits(name, "logprobs", own=listed[name].chatreid)
    question = [make_image_part(encode_grey_picture()), {"type": "text", "text": QUESTION}]

    def ask_logprobs(count: int) -> ServerTraits:
        body = make_body(name, question, extra, logprobs=True, top_logprobs=count)
        try:
            client.ask("/chat/completions", body, lambda answer: need_logprobs(read_logprobs(answer)))
        except MissingLogprobs:
            return ask_answers()
        return ServerTraits(name, "logprobs", count)

    def ask_answers() -> ServerTraits:
        if votes > 1:
            with suppress(RejectedRequest):
                if ask_texts(n=2, temperature=1.0) > 1:
                    return ServerTraits(name, "answers", several_choices=True)
        ask_texts()
        return ServerTraits(name, "answers")

    def ask_texts(**changes: Any) -> int:
        body = make_body(name, question, extra, **changes)
        return len(client.ask("/chat/completions", body, read_texts))

    # Nothing but a refusal says that so many alternatives are too many.
    return client.probe([*(partial(ask_logprobs, count) for count in TOP_LOGPROBS), ask_answers])


def _list_models(client: OpenAIClient, *, must: bool) -> dict[str, ListedModel]:
    """Return the server's models; nothing where it keeps no list, unless it ``must`` tell."""
    try:
        return client.list_models()
    except (UpstreamError, RejectedRequest, BrokenAnswer) as failure:
        if must:
            raise ConfigError(
                f"{client.host} does not tell its models ({failure}). Set `model` if it keeps no list."
            ) from None
        return {}  # the next question gives the reason, if it is one


class HttpScorer:
    """Asks a server; what its scores are (``confidence``) depends on what the server gives.

    Attributes:
        traits: what the server gives, found out when this is made.
        confidence: ``margins`` where it gives log-probabilities, else ``answers``.
        filled: words or answers so far that the server did not give and that were filled in.
    """

    confidence: Literal["margins", "answers"]

    def __init__(self, server: ServerSettings, model: ModelSettings, image_root: Path) -> None:
        """Ask the server what it gives.

        Args:
            server: where it is.
            model: the image policy and the system prompt that the model behind it was trained with.
            image_root: where the images are.

        Raises:
            ConfigError: no key, or no model named where the server has several.
            UpstreamError: the server is out of reach, or refuses the key, the model or images.
        """
        self._server, self._system_prompt, self._policy = server, model.system_prompt, model.policy
        self.image_root = image_root
        self.filled = 0
        self._urls: OrderedDict[str, str] = OrderedDict()
        self._lock = Lock()
        asked = Server(
            server.base_url,
            server.api_key_variable,
            "server.api_key_variable",
            "the evaluation's settings",
            server.timeout,
            server.retries,
            server.concurrency,
        )
        self.client = OpenAIClient(asked, server.model or "")
        self.traits = probe_server(self.client, server.model, server.extra_body, server.votes)
        self.confidence = "margins" if self.traits.gives == "logprobs" else "answers"
        if self.traits.own is not None:
            self._check_system_prompt(self.traits.own.get("system_prompt"))
            # Our own server works on one request at a time: a queue there would count as time-outs here.
            self.client.limit(min(2, server.concurrency))
        if self.traits.gives == "answers":
            logger.warning(
                "%s gives no log-probabilities: scores are hard answers (votes: %d), so that most images tie.",
                self.client.host,
                server.votes,
            )

    def _check_system_prompt(self, own: str | None) -> None:
        """Refuse a system prompt that is not the one `chatreid serve` was started with, which asks in its own."""
        if self._system_prompt not in (None, own):
            raise ConfigError(
                f"model.system_prompt: {self._system_prompt!r} is not that of {self.client.host}, {own!r}. Remove "
                "it, or start `chatreid serve` with it: model.system_prompt=..."
            )

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The server, or the weights behind `chatreid serve` wherever it runs; what it gives; what it is asked."""
        own = self.traits.own or {}
        loaded = {key: own.get(key) for key in ("weights", "configuration")}
        server = loaded if own else {"base_url": self._server.base_url}
        votes = {"votes": self._server.votes} if self.traits.gives == "answers" else {}
        return {
            **server,
            **votes,
            "system_prompt": own.get("system_prompt") if own else self._system_prompt,
            "model": self.traits.model,
            "gives": self.traits.gives,
            "top_logprobs": self.traits.top_logprobs,
            "extra_body": self._server.extra_body,
        }

    def prepare(
        self, queries: Sequence[Query], gallery: Sequence[ImageRecord], planned: Sequence[ImageRecord] = ()
    ) -> None:
        """Say what leaves this machine; images are encoded when they are sent."""
        if not is_local(self._server.base_url):
            images = len(gallery) + sum(query.image is not None for query in queries)
            logger.warning(
                "Sending %d images of people to %s (model %s).", images, self.client.host, self.traits.model
            )

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Return one score a candidate (K,): margins, or shares of votes for Yes.

        Raises:
            DataError: an image cannot be read.
            UpstreamError: the server failed finally at a candidate, which is named.
        """
        prompt = build_pair_prompt(query, task)
        shown = [query.image] if query.image is not None and prompt.image_count > 1 else []

        def score(position: int) -> list[float]:
            return self._ask(prompt, [*shown, candidates[position]], task)

        def score_together(position: int) -> list[float]:
            return self._ask_own(query, candidates[starts[position] :][:SCORED_TOGETHER], task)

        if self.traits.own is None:
            found = self._work(query, [record.path for record in candidates], score)
        else:
            starts = range(0, len(candidates), SCORED_TOGETHER)
            names = [f"{candidates[start].path} and those after it" for start in starts]
            found = self._work(query, names, score_together)
        return np.array([value for values in found for value in values], dtype=np.float32)

    def choose(self, query: Query, windows: Sequence[Sequence[ImageRecord]], task: str) -> list[ScoreArray]:
        """Return one score a candidate (N,) of each window: the letters' log-probabilities, or shares of votes.

        Raises:
            DataError: an image cannot be read, or more than 26 candidates.
            UpstreamError: the server failed finally.
        """
        prompts = [build_choice_prompt(query, task, len(window)) for window in windows]

        def choose(position: int) -> list[float]:
            prompt, window = prompts[position], windows[position]
            if self.traits.own is not None:
                return self._ask_own(query, window, task)
            shown = [query.image] if query.image is not None and prompt.image_count > len(window) else []
            return self._ask(prompt, [*shown, *window], task, len(window))

        found = self._work(query, [f"a choice of {len(window)}" for window in windows], choose)
        return [np.array(values, dtype=np.float32) for values in found]

    def _work(self, query: Query, names: Sequence[str], ask: Callable[[int], list[float]]) -> list[list[float]]:
        """Return each question's scores; ``concurrency`` questions are on their way at any time."""
        results: list[list[float]] = [[]] * len(names)
        for position, scores in self.client.map(ask, range(len(names))):
            try:
                results[position] = scores.result()
            except FAILURES as failure:
                raise UpstreamError(
                    f"{self.client.host} failed at query {query.label}, candidate {names[position]}: {failure}. "
                    "Finished queries are kept; the same command goes on from there."
                ) from None
        return results

    def _encode(self, record: ImageRecord) -> str:
        """Return an image as the model shall see it, as a data URL."""
        with self._lock:  # so that threads that need the same image do not all encode it
            if record.image_id in self._urls:
                self._urls.move_to_end(record.image_id)
            else:
                picture = prepare_crop(open_crop(self.image_root / record.path), self._policy)
                self._urls[record.image_id] = encode_picture(picture)
                while len(self._urls) > KEPT_IMAGES:
                    self._urls.popitem(last=False)
            return self._urls[record.image_id]

    def _ask(self, prompt: Prompt, images: Sequence[ImageRecord], task: str, options: int = 0) -> list[float]:
        """Return the scores of a pair, or of the ``options`` of a choice."""
        parts, server, traits = self._make_parts(prompt, images), self._server, self.traits
        extra = {k: v for k, v in server.extra_body.items() if not (options and k in PAIR_KEYS)}
        make = partial(make_body, traits.model, parts, extra, self._system_prompt)
        words = LETTERS[:options] if options else (YES, NO)
        if traits.gives == "logprobs":
            body = make(logprobs=True, top_logprobs=traits.top_logprobs)
            best = self.client.ask("/chat/completions", body, lambda answer: need_logprobs(read_logprobs(answer)))
            values, filled = look_up(best, words)
            values = values if options else [values[0] - values[1]]
        else:
            changes: dict[str, Any] = {"max_tokens": CHOICE_TOKENS if options else PAIR_TOKENS}
            changes |= {"temperature": 1.0} if server.votes > 1 else {}
            changes |= {"n": server.votes} if server.votes > 1 and traits.several_choices else {}
            requests = 1 if traits.several_choices else server.votes
            answers = [self.client.ask("/chat/completions", make(**changes), read_texts) for _ in range(requests)]
            values, filled = count_votes(task, [text for texts in answers for text in texts], options)
        self._fill(filled)
        return values

    def _make_parts(self, prompt: Prompt, images: Sequence[ImageRecord]) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for number, segment in enumerate(prompt.segments):
            parts += [make_image_part(self._encode(images[number - 1]))] if number else []
            parts += [{"type": "text", "text": segment}] if segment else []
        return parts

    def answer(self, prompt: Prompt, images: Sequence[ImageRecord], limit: int) -> str:
        """Return the model's answer in words to a question with images, of ``limit`` tokens at most.

        Raises:
            DataError: an image cannot be read.
            UpstreamError: the server failed finally.
        """
        extra = {key: value for key, value in self._server.extra_body.items() if key not in PAIR_KEYS}
        prepared = {"prepared": True} if self.traits.own is not None else {}
        parts = self._make_parts(prompt, images)
        body = make_body(self.traits.model, parts, extra, self._system_prompt, max_tokens=limit, **prepared)
        try:
            return self.client.ask("/chat/completions", body, read_texts)[0].strip()
        except FAILURES as failure:
            raise UpstreamError(f"{self.client.host} does not answer: {failure}") from None

    def _fill(self, count: int) -> None:
        with self._lock:
            is_news = count > 0 and self.filled == 0
            self.filled += count
        if is_news:
            logger.warning(
                "%s does not always return the words asked for; a missing one counts as the least likely one "
                "returned, an answer that says neither as half a vote.",
                self.client.host,
            )

    def _ask_own(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> list[float]:
        """Ask `chatreid serve` for many scores at once."""
        asked: dict[str, Any] = {"text": query.text, "attributes": dict(query.attributes)}
        if query.image is not None:
            asked["image"] = self._encode(query.image)
        body = {
            "model": self.traits.model,
            "query": asked,
            "candidates": [self._encode(record) for record in candidates],
            "task": task,
            "prepared": True,
        }
        return self.client.ask("/score", body, lambda answer: _read_scores(answer, len(candidates)))


class MissingLogprobs(BrokenAnswer):
    """A chat completion without log-probabilities; may be a passing fault, as any broken answer."""


class _Scores(BaseModel):
    scores: list[Annotated[float, Field(ge=-HIGHEST, le=HIGHEST)]]


def _read_scores(body: object, count: int) -> list[float]:
    scores = read_as(_Scores, body, "list of scores").scores
    if len(scores) != count:
        raise BrokenAnswer(f"{len(scores)} scores instead of {count}")
    return scores


def read_texts(body: object) -> list[str]:
    """Return the text of every choice.

    Raises:
        BrokenAnswer: no chat completion.
    """
    choices = read_as(Completion, body).choices
    return [choice.message and choice.message.content or "" for choice in choices]


def read_logprobs(body: object) -> dict[str, float]:
    """Return the log-probabilities of the first answer token's best alternatives; empty if the reply has none.

    Tokens are given without the space before them; of two spellings the likelier one counts.

    Raises:
        BrokenAnswer: no chat completion, or a log-probability that is no number.
    """
    found = read_as(Completion, body).choices[0].logprobs
    best: dict[str, float] = {}
    for entry in found.content[0].top_logprobs if found else ():
        if math.isnan(entry.logprob) or entry.logprob > HIGHEST:
            raise BrokenAnswer("a log-probability is no number")
        token = unicodedata.normalize("NFC", entry.token).strip(_SPACES)
        best[token] = max(entry.logprob, best.get(token, LOWEST))  # minus infinity becomes LOWEST
    return best


def need_logprobs(best: dict[str, float]) -> dict[str, float]:
    """Return log-probabilities.

    Raises:
        MissingLogprobs: there are none.
    """
    if not best:
        raise MissingLogprobs("its answer has no log-probabilities")
    return best


def look_up(best: Mapping[str, float], words: Sequence[str]) -> tuple[list[float], int]:
    """Return the log-probability of each word, and how many were missing and count as the least likely returned."""
    least = min(best.values())
    return [best.get(word, least) for word in words], sum(word not in best for word in words)


def count_votes(task: str, texts: Sequence[str], options: int = 0) -> tuple[list[float], int]:
    """Return the share of texts that say Yes, or name each option of a choice; and how many say nothing of the kind.

    A text that says neither Yes nor No is half a vote.
    """
    found = [read_answer(task, text, options) for text in texts]
    if options:
        shares = [sum(option in answer.indices for answer in found) / len(found) for option in range(options)]
        return shares, sum(not answer.indices for answer in found)
    votes = [UNREADABLE_VOTE if answer.match is None else float(answer.match) for answer in found]
    return [sum(votes) / len(votes)], sum(answer.match is None for answer in found)

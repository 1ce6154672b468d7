"""Score with any OpenAI-compatible server: ``backend: http``.

Every pair is one request, except with `chatreid serve`, which scores many pairs a request (``/v1/score``). One query's
pairs are asked together and show the query first, so that servers with a prefix cache compute it once.
"""

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ...crops import encode_picture, open_crop, prepare_crop
from ...errors import ConfigError, UpstreamError
from ...eval_settings import EvalSettings
from ...records import ImageRecord
from ...servers.answers import BrokenAnswer
from ...servers.background import BackgroundLoop
from ...servers.client import RejectedRequest, ServerAddress, ServerClient, TemporaryFailure
from ...servers.key import is_local
from ...tasks import LETTERS
from ..arrays import ScoreArray
from ..prompts import Prompt, build_choice_prompt, build_pair_prompt
from ..queries import Query
from .http_probe import make_body, make_image_part, probe_server
from .http_replies import (
    HIGHEST,
    compute_letters,
    compute_margin,
    count_letter_votes,
    count_votes,
    read_again,
    read_logprobs,
    read_number,
    read_texts,
)


# Candidates of one request to `chatreid serve`: even as noise, crops of the default 768x768 pixels fit.
SCORED_TOGETHER = 24
# Encoded images kept: those of one query's candidates are often the next one's, too.
KEPT_IMAGES = 1024
PAIR_TOKENS = 4
CHOICE_TOKENS = 64
# Keys of extra_body that name the tokens Yes and No, as vLLM has them: a choice answers with letters.
PAIR_KEYS = ("allowed_token_ids", "logprob_token_ids")

logger = logging.getLogger(__name__)


class HttpScorer:
    """Asks a server; what its scores are (``confidence``) depends on what the server gives.

    Attributes:
        traits: what the server gives, found out when this is made.
        confidence: ``margins`` where it gives log-probabilities, else ``answers``.
        filled: words or answers so far that the server did not give and that were filled in.
    """

    confidence: Literal["margins", "answers"]

    def __init__(self, settings: EvalSettings, image_root: Path) -> None:
        """Ask the server what it gives.

        Raises:
            ConfigError: no key, or no model named where the server has several.
            UpstreamError: the server is out of reach, or refuses the key, the model or images.
        """
        self.settings = settings
        self.image_root = image_root
        self.filled = 0
        self._urls: OrderedDict[str, str] = OrderedDict()
        self._loop = BackgroundLoop()
        self._client = ServerClient(
            ServerAddress(
                settings.base_url,
                settings.model or "",
                settings.api_key_variable,
                settings.timeout,
                settings.retries,
                "the evaluation's settings",
                "api_key_variable",
            )
        )
        self._loop.end_with(self, self._client.close)
        probing = probe_server(self._client, settings.model, settings.extra_body, settings.votes)
        self.traits = self._loop.run(probing)
        self._check_system_prompt()
        self.confidence = "margins" if self.traits.gives == "logprobs" else "answers"
        # Our own server works on one request at a time: a queue there would count as time-outs here.
        most = settings.concurrency if self.traits.own is None else min(2, settings.concurrency)
        self._slots = asyncio.Semaphore(most)
        if self.traits.gives == "answers":
            logger.warning(
                "%s gives no log-probabilities: scores are hard answers (votes: %d), so that most images tie.",
                self._client.host,
                settings.votes,
            )

    def _check_system_prompt(self) -> None:
        """Refuse a system prompt that is not the one `chatreid serve` was started with, which asks in its own."""
        own, wanted = self.traits.own, self.settings.system_prompt
        if own is not None and wanted not in (None, own.get("system_prompt")):
            raise ConfigError(
                f"system_prompt: {wanted!r} is not that of {self._client.host}, {own.get('system_prompt')!r}. Remove "
                "it, or start `chatreid serve` with it: system_prompt=..."
            )

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The server, or the weights behind `chatreid serve` wherever it runs; what it gives; what it is asked."""
        own = self.traits.own or {}
        loaded = {key: own.get(key) for key in ("weights", "configuration")}
        server = loaded if own else {"base_url": self.settings.base_url}
        votes = {"votes": self.settings.votes} if self.traits.gives == "answers" else {}
        return {
            **server,
            **votes,
            "system_prompt": own.get("system_prompt") if own else self.settings.system_prompt,
            "model": self.traits.model,
            "gives": self.traits.gives,
            "top_logprobs": self.traits.top_logprobs,
            "extra_body": self.settings.extra_body,
        }

    def prepare(
        self, queries: Sequence[Query], gallery: Sequence[ImageRecord], planned: Sequence[ImageRecord] = ()
    ) -> None:
        """Say what leaves this machine; images are encoded when they are sent."""
        if not is_local(self.settings.base_url):
            images = len(gallery) + sum(query.image is not None for query in queries)
            logger.warning(
                "Sending %d images of people to %s (model %s).", images, self._client.host, self.traits.model
            )

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Return one score a candidate (K,): margins, or shares of votes for Yes.

        Raises:
            DataError: an image cannot be read.
            UpstreamError: the server failed finally at a candidate, which is named.
        """
        prompt = build_pair_prompt(query, task)
        if self.traits.own is not None:
            return self._score_together(query, candidates, task)
        shown = [query.image] if query.image is not None and prompt.image_count > 1 else []

        async def score(position: int) -> list[float]:
            record = candidates[position]
            return [await self._ask_pair(prompt, [*shown, record], task)]

        return _join(self._run(query, [record.path for record in candidates], score))

    def choose(self, query: Query, windows: Sequence[Sequence[ImageRecord]], task: str) -> list[ScoreArray]:
        """Return one score a candidate (N,) of each window: the letters' log-probabilities, or shares of votes.

        Raises:
            DataError: an image cannot be read, or more than 26 candidates.
            UpstreamError: the server failed finally.
        """
        prompts = [build_choice_prompt(query, task, len(window)) for window in windows]

        async def choose(position: int) -> list[float]:
            prompt, window = prompts[position], windows[position]
            if self.traits.own is not None:
                return await self._ask_own(query, window, task)
            shown = [query.image] if query.image is not None and prompt.image_count > len(window) else []
            return await self._ask_choice(prompt, [*shown, *window], task, len(window))

        answers = self._run(query, [f"a choice of {len(window)}" for window in windows], choose)
        return [np.array(values, dtype=np.float32) for values in answers]

    def _run(
        self, query: Query, names: Sequence[str], score: Callable[[int], Awaitable[list[float]]]
    ) -> list[list[float]]:
        """Return each question's scores; ``concurrency`` questions are on their way at any time."""
        results: list[list[float]] = [[]] * len(names)
        positions = iter(range(len(names)))

        async def work() -> None:
            for position in positions:
                try:
                    async with self._slots:  # other threads may ask, too
                        results[position] = await read_again(partial(score, position))
                except (BrokenAnswer, RejectedRequest, TemporaryFailure) as failure:
                    raise UpstreamError(
                        f"{self._client.host} failed at query {query.label}, candidate {names[position]}: {failure}. "
                        "Finished queries are kept; the same command goes on from there."
                    ) from None

        async def work_all() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.settings.concurrency, len(names))):
                        group.create_task(work())
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None  # it has cancelled the other workers

        self._loop.run(work_all())
        return results

    def _encode(self, record: ImageRecord) -> str:
        """Return an image as the model shall see it, as a data URL."""
        if record.image_id in self._urls:
            self._urls.move_to_end(record.image_id)
        else:
            picture = prepare_crop(open_crop(self.image_root / record.path), self.settings.policy)
            self._urls[record.image_id] = encode_picture(picture)
            while len(self._urls) > KEPT_IMAGES:
                self._urls.popitem(last=False)
        return self._urls[record.image_id]

    async def _ask(self, prompt: Prompt, images: Sequence[ImageRecord], choice: bool) -> list[object]:
        """Return the replies that make one answer: one with log-probabilities, or as many texts as there are votes."""
        parts: list[dict[str, Any]] = []
        for number, segment in enumerate(prompt.segments):
            parts += [make_image_part(self._encode(images[number - 1]))] if number else []
            parts += [{"type": "text", "text": segment}] if segment else []
        extra = {k: v for k, v in self.settings.extra_body.items() if not (choice and k in PAIR_KEYS)}
        changes: dict[str, Any] = {"logprobs": True, "top_logprobs": self.traits.top_logprobs}
        count = 1
        if self.traits.gives == "answers":
            votes = self.settings.votes
            changes = {"max_tokens": CHOICE_TOKENS if choice else PAIR_TOKENS}
            changes |= {"temperature": 1.0} if votes > 1 else {}
            changes |= {"n": votes} if votes > 1 and self.traits.several_choices else {}
            count = 1 if self.traits.several_choices else votes
        body = make_body(self.traits.model, parts, extra, self.settings.system_prompt, **changes)
        return [await self._client.ask("/chat/completions", body) for _ in range(count)]

    async def _ask_pair(self, prompt: Prompt, images: Sequence[ImageRecord], task: str) -> float:
        replies = await self._ask(prompt, images, choice=False)
        if self.traits.gives == "answers":
            value = count_votes(task, [text for reply in replies for text in read_texts(reply)])
        else:
            value = compute_margin(read_logprobs(replies[0]))
        self._fill(value.filled)
        return value.number

    async def _ask_choice(self, prompt: Prompt, images: Sequence[ImageRecord], task: str, count: int) -> list[float]:
        replies = await self._ask(prompt, images, choice=True)
        if self.traits.gives == "answers":
            texts = [text for reply in replies for text in read_texts(reply)]
            values, filled = count_letter_votes(task, texts, count)
        else:
            values, filled = compute_letters(read_logprobs(replies[0]), LETTERS[:count])
        self._fill(filled)
        return values

    def _fill(self, count: int) -> None:
        if count and not self.filled:
            logger.warning(
                "%s does not always return the words asked for; a missing one counts as the least likely one "
                "returned, an answer that says neither as half a vote.",
                self._client.host,
            )
        self.filled += count

    def _score_together(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Ask `chatreid serve` for many scores a request."""
        starts = range(0, len(candidates), SCORED_TOGETHER)

        async def score(position: int) -> list[float]:
            return await self._ask_own(query, candidates[starts[position] :][:SCORED_TOGETHER], task)

        return _join(self._run(query, [f"{candidates[start].path} and those after it" for start in starts], score))

    async def _ask_own(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> list[float]:
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
        return _read_scores(await self._client.ask("/score", body), len(candidates))


def _join(scores: Sequence[Sequence[float]]) -> ScoreArray:
    return np.array([value for values in scores for value in values], dtype=np.float32)


def _read_scores(body: object, count: int) -> list[float]:
    found = cast(dict[str, Any], body).get("scores") if isinstance(body, dict) else None
    if not isinstance(found, list) or len(cast(list[object], found)) != count:
        raise BrokenAnswer(f"not {count} scores: {str(body)[:120]}")
    try:
        scores = [read_number(value) for value in cast(list[Any], found)]
    except (TypeError, ValueError):
        scores = [math.nan]
    if not all(abs(score) <= HIGHEST for score in scores):
        raise BrokenAnswer(f"a score is no number: {str(body)[:120]}")
    return scores

"""The model behind the server: one request at a time is scored or answered, and nothing touches the disk."""

import hashlib
import math
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import __version__
from ..datasets.benchmark import Query
from ..eval.backends.transformers import TransformersScorer
from ..eval.questions import build_choice_prompt, build_pair_prompt
from ..eval.settings import ModelSettings
from ..images import read_geometry
from ..records import ImageRecord
from ..tasks import TASKS
from .bodies import ChatRequest, RequestFault, ScoreRequest
from .completions import Completion, check_length, check_words, complete, render_messages
from .pictures import PLAIN, Picture, check_count, open_pictures


# Of one request, question and answer, where the model would take more; and its images together.
MOST_QUESTION_TOKENS = 32_768
MOST_IMAGE_TOKENS = 32_768
# Of one step of the vision tower or of the decoder: a batch of 64 pairs of 256x128 pixels.
BATCH_TOKENS = 16_384
# What is kept of earlier requests; for 256x128 crops, a 2B model and bf16 15,000 images.
MOST_KEPT_BYTES = 2 << 30
# What the chat's frame adds to the words of a question and of the system prompt.
_FRAME = 64


class ServedModel:
    """A checkpoint that is asked.

    Attributes:
        name: what requests call it.
        settings: the image policy, device, dtype.
    """

    def __init__(self, settings: ModelSettings, name: str) -> None:
        """Load the checkpoint.

        Raises:
            ConfigError, UpstreamError: see ``TransformersScorer``.
        """
        self.settings = settings
        self.name = name
        # Pictures come to it resized: the policy is applied here, or by the sender.
        plain = {"chatreid_stage": PLAIN.stage, "image_max_pixels": PLAIN.image_max_pixels, "image_min_pixels": 1}
        self._scorer = TransformersScorer(settings.model_copy(update=plain), Path())
        self._scorer.limit_batches(BATCH_TOKENS)
        self._scorer.features.read_image = lambda record: self._decoded[record.image_id]
        self._decoded: dict[str, Image.Image] = {}
        self._geometry = read_geometry(self._scorer.processor.image_processor)
        context = self._scorer.model.config.get_text_config().max_position_embeddings
        self._longest = min(context, MOST_QUESTION_TOKENS)
        self._lock = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """Return the entry of /v1/models; ``chatreid`` is what a plain OpenAI server has not."""
        policy = self.settings.policy
        own = {
            "version": __version__,
            "weights": self._scorer.fingerprint["weights"],
            "configuration": self._scorer.fingerprint["configuration"],
            "dtype": self.settings.dtype,
            "system_prompt": self._scorer.system_prompt,
            "chatreid_stage": policy.stage,
            "chatreid_aspect": policy.aspect,
            "image_max_pixels": policy.image_max_pixels,
            "image_min_pixels": policy.image_min_pixels,
        }
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "chatreid_plugin", "chatreid": own}

    def check_name(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            RequestFault: status 404.
        """
        if name is not None and name != self.name:
            raise RequestFault(f"The model {name!r} does not exist; this server has {self.name!r}.", 404)

    def score(self, request: ScoreRequest) -> list[float]:
        """Return a score for each candidate: margins for a yes/no task, else one for each letter.

        Raises:
            RequestFault: see ``bodies`` and ``pictures``.
            ConfigError, DataError: the task does not fit the query.
        """
        self.check_name(request.model)
        kind = TASKS[request.task].answer_kind if request.task in TASKS else "unknown"
        if kind not in ("match", "letters"):
            known = ", ".join(task.name for task in TASKS.values() if task.answer_kind in ("match", "letters"))
            raise RequestFault(f"The task {request.task!r} gives no scores; tasks that do: {known}.")
        for words in (request.query.text, *request.query.attributes, *request.query.attributes.values()):
            check_words(words)
        own = [] if request.query.image is None else [request.query.image]
        urls = [*own, *request.candidates]
        check_count(len(urls))
        names = [f"{hashlib.sha256(url.encode()).hexdigest()}-{request.prepared}" for url in urls]
        records = [ImageRecord(name, "served", "gallery", name, "", "", 0, 0) for name in names]
        asked, candidates = records[: len(own)], records[len(own) :]
        image = asked[0] if asked else None
        query = Query("query", "", image=image, text=request.query.text, attributes=request.query.attributes)
        with self._lock:
            pictures, tokens = self._open(dict(zip(names, urls, strict=True)), prepared=request.prepared)
            counts = [tokens[name] for name in names]
            self._check_question(query, request.task, counts[: len(own)], counts[len(own) :])
            with self._show(pictures):
                if kind == "match":
                    scores = self._scorer.score_pairs(query, candidates, request.task)
                else:
                    (scores,) = self._scorer.choose(query, [candidates], request.task)
        if not np.isfinite(scores).all():
            raise RequestFault(
                "The model gives scores that are no numbers; start the server with model.dtype=float32.", 500
            )
        return scores.tolist()

    def _open(self, urls: Mapping[str, str], *, prepared: bool) -> tuple[dict[str, Picture], dict[str, int]]:
        """Return the pictures that the scorer has not encoded yet, by name, and the tokens of all."""
        if self._scorer.kept_bytes > MOST_KEPT_BYTES:
            self._scorer.forget_images()
        features = self._scorer.features
        new = [name for name in urls if name not in features]
        found = open_pictures([urls[name] for name in new], self.settings.policy, prepared=prepared)
        pictures = dict(zip(new, found, strict=True))
        known = {name: features[name].grid for name in urls if name in features}
        tokens = {name: math.prod(grid) // self._geometry.merge_size**2 for name, grid in known.items()}
        return pictures, tokens | {name: one.count_tokens(self._geometry) for name, one in pictures.items()}

    def _check_question(self, query: Query, task: str, own: Sequence[int], candidates: Sequence[int]) -> None:
        """Refuse a question that is too long, whose images take so many tokens; pairs are a question each."""
        _check_images([*own, *candidates])
        if TASKS[task].answer_kind == "match":
            prompt, images = build_pair_prompt(query, task), max(candidates)
        else:
            prompt, images = build_choice_prompt(query, task, len(candidates)), sum(candidates)
        tokenizer = self._scorer.processor.tokenizer
        words = "".join([self._scorer.system_prompt, *prompt.segments])
        check_length(tokenizer, words, _FRAME + sum(own) + images, self._longest)

    @contextmanager
    def _show(self, pictures: Mapping[str, Picture]) -> Generator[None]:
        """Let the scorer find pictures, decoded one at a time."""
        try:
            self._decoded = {name: picture.decode() for name, picture in pictures.items()}
            yield
        finally:
            self._decoded = {}

    def complete(self, request: ChatRequest) -> Completion:
        """Return the answer to a chat.

        Raises:
            RequestFault: see ``bodies``, ``pictures`` and ``completions``.
        """
        self.check_name(request.model)
        request.check()
        text = render_messages(request.messages, self._scorer.system_prompt)
        parts = [part for message in request.messages if isinstance(message.content, list) for part in message.content]
        urls = [part.image_url.url if part.image_url else "" for part in parts if part.type == "image_url"]
        check_count(len(urls))
        pictures = open_pictures(urls, self.settings.policy, prepared=request.prepared)
        tokens = [picture.count_tokens(self._geometry) for picture in pictures]
        _check_images(tokens)
        processor = self._scorer.processor
        check_length(processor.tokenizer, text, sum(tokens) + request.token_limit, self._longest)
        alternatives = (request.top_logprobs or 0) if request.logprobs else None
        with self._lock:
            decoded = [picture.decode() for picture in pictures]
            return complete(self._scorer.model, processor, text, decoded, request.token_limit, alternatives)


def _check_images(tokens: Sequence[int]) -> None:
    if sum(tokens) > MOST_IMAGE_TOKENS:
        raise RequestFault(
            f"The images of the request take {sum(tokens)} tokens; {MOST_IMAGE_TOKENS} is most. Send fewer or smaller "
            "ones, or start the server with a smaller model.image_max_pixels.",
            413,
        )

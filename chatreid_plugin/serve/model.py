"""The model behind the server: one request at a time is scored or answered, pictures pass through a folder."""

import hashlib
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .. import __version__
from ..eval.backends.transformers import TransformersScorer
from ..eval.queries import Query
from ..eval_settings import EvalSettings
from ..records import ImageRecord
from ..tasks import TASKS
from .bodies import ChatRequest, RequestFault, ScoreRequest
from .completions import Completion, complete, render_messages
from .pictures import read_picture


# Of one request.
MOST_IMAGES = 128
# Encoded images that are kept for later requests: 1.4 GB for 256x128 crops, a 2B model and bf16.
MOST_ENCODED = 10_000
# Larger than any picture that is taken, so that what the policy has made is not resized again.
_NO_LIMIT = 1 << 40


class ServedModel:
    """A checkpoint that is asked.

    Attributes:
        name: what requests call it.
        settings: the image policy, device, dtype.
    """

    def __init__(self, settings: EvalSettings, name: str) -> None:
        """Load the checkpoint.

        Raises:
            ConfigError, UpstreamError: see ``TransformersScorer``.
        """
        self.settings = settings
        self.name = name
        self._folder = TemporaryDirectory(prefix="chatreid-serve-")
        # Pictures come to it resized: the policy is applied here, or by the sender.
        plain = {"chatreid_stage": None, "image_max_pixels": _NO_LIMIT, "image_min_pixels": 1}
        self._scorer = TransformersScorer(settings.model_copy(update=plain), Path(self._folder.name))
        self._lock = threading.Lock()

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()

    def describe(self) -> dict[str, Any]:
        """Return the entry of /v1/models; ``chatreid`` is what a plain OpenAI server has not."""
        policy = self.settings.policy
        own = {
            "version": __version__,
            "weights": self._scorer.fingerprint["weights"],
            "configuration": self._scorer.fingerprint["configuration"],
            "dtype": self.settings.dtype,
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
        own = [] if request.query.image is None else [request.query.image]
        urls = [*own, *request.candidates]
        _check_count(urls)
        with self._lock, self._write(urls, prepared=request.prepared) as records:
            image = records[0] if own else None
            query = Query("query", "", image=image, text=request.query.text, attributes=request.query.attributes)
            candidates = records[len(own) :]
            if kind == "match":
                scores = self._scorer.score_pairs(query, candidates, request.task)
            else:
                (scores,) = self._scorer.choose(query, [candidates], request.task)
        if not np.isfinite(scores).all():
            raise RequestFault("The model gives scores that are no numbers; start the server with dtype=float32.", 500)
        return scores.tolist()

    @contextmanager
    def _write(self, urls: Sequence[str], *, prepared: bool) -> Generator[list[ImageRecord]]:
        """Give the scorer pictures as files; those that it has encoded before are not even decoded again."""
        folder = Path(self._folder.name)
        if len(self._scorer.features) > MOST_ENCODED:
            self._scorer.forget_images()
        names = [f"{hashlib.sha256(url.encode()).hexdigest()}-{prepared}.png" for url in urls]
        new = {name: url for name, url in zip(names, urls, strict=True) if name not in self._scorer.features}
        try:
            for name, url in new.items():
                picture = read_picture(url, self.settings.policy, prepared=prepared)
                picture.save(folder / name, compress_level=0)
            yield [ImageRecord(name, "served", "gallery", name, "", "", 0, 0) for name in names]
        finally:
            for name in new:
                (folder / name).unlink(missing_ok=True)

    def complete(self, request: ChatRequest) -> Completion:
        """Return the answer to a chat.

        Raises:
            RequestFault: see ``bodies``, ``pictures`` and ``completions``.
        """
        self.check_name(request.model)
        request.check()
        parts = [part for message in request.messages if isinstance(message.content, list) for part in message.content]
        urls = [part.image_url.url if part.image_url else "" for part in parts if part.type == "image_url"]
        _check_count(urls)
        pictures = [read_picture(url, self.settings.policy, prepared=request.prepared) for url in urls]
        text = render_messages(request.messages, self._scorer.model.config.model_type)
        alternatives = (request.top_logprobs or 0) if request.logprobs else None
        with self._lock:
            return complete(
                self._scorer.model, self._scorer.processor, text, pictures, request.token_limit, alternatives
            )


def _check_count(urls: Sequence[str]) -> None:
    if len(urls) > MOST_IMAGES:
        raise RequestFault(f"{len(urls)} images are too many; {MOST_IMAGES} is most for one request.", 413)

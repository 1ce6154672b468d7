"""A fake server on a real socket, a scorer that asks it, and crops whose grey value says how much it likes them."""

import base64
import io
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.eval.backends.http import HttpScorer
from chatreid_plugin.records import ImageRecord
from tests.support import make_eval_settings


KEY = "sk-test-0123456789"
GREYS = (40, 80, 120, 160, 200)


def make_completion(best: dict[str, float] | None = None, texts: tuple[str, ...] = ("Yes",)) -> dict[str, Any]:
    """Return the body of a chat completion with one token's alternatives."""
    choices: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        choice: dict[str, Any] = {"index": index, "message": {"role": "assistant", "content": text}}
        if best is not None:
            entries = [{"token": token, "logprob": value, "bytes": None} for token, value in best.items()]
            choice["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
        choices.append(choice)
    return {"object": "chat.completion", "choices": choices}


def read_colours(body: dict[str, Any]) -> list[list[int]]:
    """Return the first pixel (3,) of every image of a request."""
    parts = body["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    return [np.asarray(picture)[0, 0].tolist() for picture in pictures]


def read_greys(body: dict[str, Any]) -> list[int]:
    """Return the grey value of every image of a request."""
    return [red for red, _, _ in read_colours(body)]


def is_probe(body: dict[str, Any]) -> bool:
    return "winter" in json.dumps(body["messages"])


def answer_well(body: dict[str, Any]) -> Any:
    """Like a server with ten log-probabilities: Yes is the likelier the lighter the last image."""
    if not body.get("logprobs"):
        return make_completion()
    likes = read_greys(body)[-1] / 100
    return make_completion({"Yes": likes - 3, "No": -1.0, "Spring": -4.0})


@dataclass
class FakeServer:
    """A chat completions server; ``reply`` is given the body and returns one, or (status, body, headers, cut).

    ``models`` is the list of models, None for a server that keeps none, or a function that returns the body, or
    (status, body).
    """

    reply: Callable[[dict[str, Any]], Any] = answer_well
    models: Any = field(default_factory=lambda: {"data": [{"id": "any"}]})
    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    keys: list[str] = field(default_factory=list[str])
    base_url: str = ""
    active: int = 0
    most_active: int = 0
    lock: Any = field(default_factory=threading.Lock)

    key = KEY
    greys = GREYS
    make_completion = staticmethod(make_completion)
    read_colours = staticmethod(read_colours)
    read_greys = staticmethod(read_greys)
    is_probe = staticmethod(is_probe)
    answer_well = staticmethod(answer_well)

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """Bodies of questions about images, probes left out."""
        return [body for body in self.bodies if not is_probe(body)]

    def answer(self, path: str, headers: dict[str, str], body: Any) -> tuple[Any, ...]:
        """Note a question and return the reply to it; without a body, the models are asked for."""
        if body is None:
            models = self.models() if callable(self.models) else self.models
            return models if isinstance(models, tuple) else (200 if models is not None else 404, models)
        with self.lock:
            self.bodies.append(body)
            self.keys.append(headers["authorization"])
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        reply = self.reply(body)
        with self.lock:
            self.active -= 1
        return reply if isinstance(reply, tuple) else (200, reply)

    def misbehave(self, grey: int | None, times: int, wrong: Any) -> list[int | None]:
        """Give a wrong reply to the first requests about a candidate, None for probes; return a list of them."""
        usual, seen = self.reply, list[int | None]()

        def reply(body: dict[str, Any]) -> Any:
            if (None if is_probe(body) else read_greys(body)[-1]) == grey:
                seen.append(grey)
                if len(seen) <= times:
                    return wrong(body) if callable(wrong) else wrong
            return usual(body)

        self.reply = reply
        return seen


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, serve_answers: Callable[..., str]) -> FakeServer:
    monkeypatch.setattr("chatreid_plugin.openai_client.FIRST_WAIT", 0.01)
    monkeypatch.setenv("CHATREID_TEST_KEY", KEY)
    fake = FakeServer()
    fake.base_url = serve_answers(fake.answer)
    return fake


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    found: list[ImageRecord] = []
    for grey in GREYS:
        Image.new("RGB", (32, 64), (grey, grey, grey)).save(tmp_path / f"{grey}.png")
        found.append(ImageRecord(f"t/{grey}", "t", "gallery", f"{grey}.png", f"t:{grey}", "1", 32, 64))
    return found


@pytest.fixture
def make(server: FakeServer, tmp_path: Path) -> Callable[..., HttpScorer]:
    """Return a function that makes a scorer which asks that server."""

    def make(**changes: Any) -> HttpScorer:
        values = {"protocol": "folder", "manifest": "m.parquet", "output_dir": "out", "backend": "http"}
        values["filter"] = "none"
        values |= {"base_url": server.base_url, "api_key_variable": "CHATREID_TEST_KEY", "concurrency": 3}
        settings = make_eval_settings(values | changes)
        return HttpScorer(settings.server, settings.model, tmp_path)

    return make

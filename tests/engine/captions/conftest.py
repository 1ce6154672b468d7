"""A fake captioning endpoint on a real socket, a recipe that asks it, and what the files say afterwards."""

import base64
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import write_manifest


CAPTION_KEY = "sk-test-0123456789"
PROBE = "probe"


def make_description(text: str = "A man in a red coat.", **changes: Any) -> str:
    """Return the text of a good answer, with changes."""
    from chatreid_plugin.engine.captions.requests import ATTRIBUTES

    attributes = {name: values[0] if values else f"some {name}" for name, values in ATTRIBUTES.items()}
    answer = {"descriptions": [text, f"Again: {text}"], "attributes": attributes, "clothing_recognised": True}
    return json.dumps(answer | changes)


def make_completion(content: str | None, refusal: str | None = None) -> dict[str, Any]:
    """Return the body of a chat completion."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message}], "usage": usage}


@dataclass(frozen=True)
class Reply:
    """What the fake endpoint does with one request: wait, then answer, or cut the connection half-way."""

    body: dict[str, Any] | bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    delay: float = 0.0
    cut: bool = False


@dataclass
class FakeEndpoint:
    """A chat completions server on a real socket that misbehaves as a test says.

    ``reply`` is called with an image's path (or ``PROBE``) and how often it was asked about before.
    """

    reply: Callable[[str, int], Reply]
    names: dict[bytes, str] = field(default_factory=dict[bytes, str])
    asked: list[str] = field(default_factory=list[str])
    times: list[float] = field(default_factory=list[float])
    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    headers: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    most_active: int = 0
    base_url: str = ""
    _active: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    make_reply = Reply
    make_description = staticmethod(make_description)
    make_completion = staticmethod(make_completion)

    def misbehave(self, name: str, times: int, **changes: Any) -> None:
        """Give a wrong reply to the first requests about an image, and the usual ones afterwards."""
        usual = self.reply
        wrong = Reply(**changes)
        self.reply = lambda asked, before: wrong if asked == name and before < times else usual(asked, before)

    @property
    def images(self) -> list[str]:
        """Paths asked about, in order, probes left out."""
        return [name for name in self.asked if name != PROBE]

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[Any, ...]:
        """Note a request and return the reply to it, once its time has come."""
        url = next(part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url")
        name = self.names.get(base64.b64decode(url.partition(",")[2]), PROBE)
        with self._lock:
            before = self.asked.count(name)
            self.asked.append(name)
            self.times.append(time.monotonic())
            self.bodies.append({**body, "url": path})
            self.headers.append(headers)
            self._active += 1
            self.most_active = max(self.most_active, self._active)
        reply = self.reply(name, before)
        time.sleep(reply.delay)
        with self._lock:
            self._active -= 1
        return reply.status, reply.body, reply.headers, reply.cut


@pytest.fixture
def endpoint(serve_answers: Callable[..., str]) -> FakeEndpoint:
    """Start a fake endpoint that answers every image well, until a test gives it another ``reply``."""
    fake = FakeEndpoint(lambda name, before: Reply(make_completion(make_description(f"Seen in {name}."))))
    fake.base_url = serve_answers(fake.answer)
    return fake


@pytest.fixture
def make_captioning(
    endpoint: FakeEndpoint, make_image: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., BuildSettings]:
    """Return a function that writes a manifest of training images and one query, and a recipe that captions them."""
    monkeypatch.setattr("chatreid_plugin.openai_client.FIRST_WAIT", 0.01)
    monkeypatch.setenv("CHATREID_TEST_KEY", CAPTION_KEY)

    def make(images: int = 6, **captioning: Any) -> BuildSettings:
        root = tmp_path / "crops"
        records: list[ImageRecord] = []
        for number in range(images + 1):
            path = f"{number:03d}.jpg"
            endpoint.names[make_image(root / path).read_bytes()] = path
            record = ImageRecord(f"own/{path}", "own", "train", path, f"own:{number}", "1", 32, 64)
            records.append(replace(record, split="query") if number == images else record)
        write_manifest(tmp_path / "manifests" / "own.parquet", records, root, {})
        block = {"base_url": endpoint.base_url, "model": "gpt-4o", "api_key_variable": "CHATREID_TEST_KEY"}
        values = {
            "sources": [{"name": "own", "parser": "pattern", "root": root}],
            "manifest_dir": tmp_path / "manifests",
            "records": {"stage1": 1},
            "captioning": block | {"requests_per_minute": None, "max_failures": 0} | captioning,
        }
        return BuildSettings.model_validate(values)

    return make


@pytest.fixture
def read_answers(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """Return a function that gives path -> line of the captions file, each path once."""

    def read() -> dict[str, Any]:
        text = (tmp_path / "manifests" / "own.captions.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert len({line["path"] for line in lines}) == len(lines)
        return {line["path"]: line for line in lines}

    return read


@pytest.fixture
def read_failures(tmp_path: Path) -> Callable[[], dict[str, str]]:
    """Return a function that gives path -> reason of the file of failures, nothing where there is none."""

    def read() -> dict[str, str]:
        path = tmp_path / "manifests" / "own.caption_failures.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return {line["path"]: line["reason"] for line in lines}

    return read


@pytest.fixture
def make(make_captioning: Callable[..., BuildSettings]) -> Callable[..., BuildSettings]:
    """Return ``make_captioning``; the tests of the endpoint, where hardly anything else is made, call it so."""
    return make_captioning


@pytest.fixture
def api(endpoint: FakeEndpoint) -> FakeEndpoint:
    """Return ``endpoint``, for tests that import the module of this name."""
    return endpoint

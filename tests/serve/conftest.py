"""The tiny checkpoint behind ``chatreid serve`` on a real socket, and crops to ask about."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.pixels import encode_picture
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.serve.model import ServedModel
from chatreid_plugin.serve.server import make_app, open_listener
from tests.support import make_eval_settings


SIZES = [(64, 128), (48, 128), (200, 400), (128, 256), (64, 128), (33, 90)]


@pytest.fixture(scope="module")
def crops(write_noise: Callable[..., tuple[Path, list[ImageRecord]]]) -> tuple[Path, list[ImageRecord]]:
    """Return a folder of noise and its records."""
    return write_noise(SIZES)


@pytest.fixture(scope="module")
def make_settings(checkpoint: Path) -> Callable[..., EvalSettings]:
    """Return a function that makes settings of this checkpoint."""

    def make(**changes: Any) -> EvalSettings:
        values = {"protocol": "folder", "manifest": "m.parquet", "output_dir": "out", "device": "cpu"}
        values |= {"model_name_or_path": str(checkpoint), "dtype": "float32", "chatreid_stage": 2}
        return make_eval_settings(values | changes)

    return make


@dataclass
class Server:
    """A running server.

    Attributes:
        base_url: up to ``/v1``.
        model: behind it.
    """

    base_url: str
    model: ServedModel

    def ask(self, path: str, body: Any = None, timeout: float = 60, **headers: str) -> tuple[int, Any]:
        """Return status and body of a request; a body of bytes is sent as it is."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        fields = {"Content-Type": "application/json"} | {name.replace("_", "-"): v for name, v in headers.items()}
        request = urllib.request.Request(self.base_url.removesuffix("/v1") + path, content, fields)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def start(make_settings: Callable[..., EvalSettings]) -> Iterator[Callable[..., Server]]:
    """Return a function that serves a model in a thread."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(model: ServedModel, key: str = "", names: Sequence[str] = ()) -> Server:
        listener = open_listener("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(make_app(model, key, names), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread))
        return Server(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", model)

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def server(start: Callable[..., Server], make_settings: Callable[..., EvalSettings]) -> Server:
    """Serve the tiny model."""
    return start(ServedModel(make_settings().model, "tiny"))


@pytest.fixture(scope="module")
def urls(crops: tuple[Path, list[ImageRecord]]) -> list[str]:
    """Return the crops as data URLs, as they are."""
    return [encode_picture(Image.open(crops[0] / record.path)) for record in crops[1]]

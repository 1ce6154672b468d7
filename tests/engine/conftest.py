"""A small synthetic world in Market-1501's layout, its training images, and recipes that read it."""

import base64
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chatreid_plugin.config import BuildSettings, SourceSettings
from chatreid_plugin.demo.world import WorldSummary, write_world
from chatreid_plugin.engine.image_table import ImageTable, combine_images
from chatreid_plugin.engine.sampler import ImagePool
from chatreid_plugin.images import ImagePolicy
from chatreid_plugin.records import INSTRUCTION_SCHEMA, ImageRecord, Instruction, convert_instruction_to_row
from chatreid_plugin.shards import make_manifest_table, read_json, write_json, write_manifest, write_shard


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> WorldSummary:
    """Write a world once; nothing in it may be changed."""
    return write_world(
        tmp_path_factory.mktemp("engine") / "world",
        train_people=8,
        test_people=3,
        cameras=3,
        images_per_camera=2,
        queries_per_person=2,
        distractors=5,
        junk=4,
    )


@pytest.fixture
def world(shared_world: WorldSummary, tmp_path: Path) -> Path:
    """Return a copy of the world that a test may damage."""
    return shutil.copytree(shared_world.root, tmp_path / "world")


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., SourceSettings]:
    """Return a function that makes a source's settings; the world by default."""

    def make(**changes: Any) -> SourceSettings:
        values = {"name": "market1501", "parser": "market1501", "root": tmp_path / "world"}
        return SourceSettings.model_validate(values | {"allow_count_mismatch": True} | changes)

    return make


@pytest.fixture
def make_recipe(tmp_path: Path, world: Path) -> Callable[..., BuildSettings]:
    """Return a function that makes a recipe which builds from the world, captions included, into ``tmp_path``."""

    def make(**changes: Any) -> BuildSettings:
        source = {
            "name": "world",
            "parser": "market1501",
            "root": world,
            "captions": world / "captions.jsonl",
            "allow_count_mismatch": True,
        }
        values: dict[str, Any] = {
            "sources": [source],
            "manifest_dir": tmp_path / "manifests",
            "output_dir": tmp_path / "dataset_info",
            "records": {"stage1": 20, "stage2": 100, "stage3": 20},
            "gallery": {"max_size": 5},
            "records_per_shard": 8,
            "workers": 1,
        }
        return BuildSettings.model_validate(values | changes)

    return make


@pytest.fixture
def make_image() -> Callable[..., Path]:
    """Return a function that writes an image file, whatever its name says of the format."""

    def make(path: Path, size: tuple[int, int] = (32, 64), format: str = "JPEG") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Noise, so that the file is longer than its header and can be cut short.
        Image.effect_noise(size, 50).convert("RGB").save(path, format=format)
        return path

    return make


@pytest.fixture
def index_images() -> Callable[..., ImagePool]:
    """Return a function that indexes ImageRecords of one source for a stage."""

    def index(records: list[ImageRecord], stage: int = 2) -> ImagePool:
        table = ImageTable(combine_images([make_manifest_table(records)]))
        return ImagePool(table, table.sources[0], ImagePolicy(stage))

    return index


@pytest.fixture
def make_images() -> Callable[..., list[ImageRecord]]:
    """Return a function that makes records: people x cameras x images, a caption and attributes for everyone.

    ``colours`` is the number of colours of the upper clothing, given to the people in turn; ``outfits`` how many each
    wears, one image after the other (0: unknown); ``infrared`` how many of the cameras see infrared, the last ones.
    Further names are fields of all records.
    """

    def make(
        people: int = 20,
        cameras: int = 4,
        images: int = 3,
        colours: int = 5,
        size: tuple[int, int] = (64, 128),
        outfits: int = 0,
        infrared: int = 0,
        **changes: Any,
    ) -> list[ImageRecord]:
        records: list[ImageRecord] = []
        for person, camera, image in product(range(people), range(cameras), range(images)):
            path = f"{person}_{camera}_{image}.jpg"
            record = ImageRecord(f"own/{path}", "own", "train", path, f"own:{person}", str(camera), *size)
            described = {
                "captions": (f"person number {person}",),
                "attributes": {"upper_colour": f"colour {person % colours}", "code": str(person)},
                "clothes_id": str(image % outfits) if outfits else None,
                "modality": "visible" if camera < cameras - infrared else "infrared",
            }
            records.append(replace(record, **(described | changes)))
        return records

    return make


@pytest.fixture
def make_pool(make_images: Callable[..., Any], index_images: Callable[..., Any]) -> Callable[..., ImagePool]:
    """Return a function that makes a pool of the images of ``make_images`` for a stage."""

    def make(stage: int = 2, **changes: Any) -> ImagePool:
        return index_images(make_images(**changes), stage)

    return make


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

    def answer(self, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        """Note a request and return what to do with it."""
        url = next(part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url")
        name = self.names.get(base64.b64decode(url.partition(",")[2]), PROBE)
        with self._lock:
            before = self.asked.count(name)
            self.asked.append(name)
            self.times.append(time.monotonic())
            self.bodies.append(body)
            self.headers.append(headers)
            self._active += 1
            self.most_active = max(self.most_active, self._active)
        reply = self.reply(name, before)
        time.sleep(reply.delay)
        with self._lock:
            self._active -= 1
        return reply


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    """Start a fake endpoint that answers every image well, until a test gives it another ``reply``."""
    fake = FakeEndpoint(lambda name, before: Reply(make_completion(make_description(f"Seen in {name}."))))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = fake.answer({**body, "url": self.path}, headers)
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) + 100 * reply.cut))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                pass  # the client has given up, as it should

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    fake.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture
def make_captioning(
    endpoint: FakeEndpoint, make_image: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., BuildSettings]:
    """Return a function that writes a manifest of training images and one query, and a recipe that captions them."""
    monkeypatch.setattr("chatreid_plugin.servers.client.FIRST_WAIT", 0.01)
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
def write_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes records as a built data set of one or more shards; it returns the dataset_dir.

    Images lie in ``tmp_path / "crops"``; named settings go into the recipe of the provenance, ``recipe=False`` leaves
    it out.
    """

    def write(
        name: str, records: Sequence[Instruction], *, shard: int = 100, recipe: bool = True, **changes: Any
    ) -> Path:
        folder = tmp_path / "dataset_info"
        for number, first in enumerate(range(0, len(records), shard)):
            rows = [convert_instruction_to_row(record) for record in records[first : first + shard]]
            write_shard(folder / name / f"{number:05d}.parquet", rows, INSTRUCTION_SCHEMA)
        values: dict[str, Any] = {
            "sources": [{"name": "own", "parser": "pattern", "root": "crops"}],
            "manifest_dir": tmp_path / "manifests",
            "records": {"stage2": len(records)},
        }
        if recipe:
            settings = BuildSettings.model_validate(values | changes).model_dump(mode="json")
            write_json(folder / f"{name}.json", {"settings": settings, "records": len(records), "complete": True})
        table = folder / "dataset_info.json"
        entry = {"file_name": name, "formatting": "chatreid", "chatreid": {"image_root": "../crops"}}
        write_json(table, (read_json(table) if table.is_file() else {}) | {name: entry})
        return folder

    return write

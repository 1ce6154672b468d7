"""What tests of several parts share: a tiny world, its records and tiny models, made once; fakes and readers."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.demo.world import WorldSummary, write_world
from chatreid_plugin.records import ImageRecord
from tests.command_server import write_python


REPOSITORY = Path(__file__).parents[1]
Crops = tuple[Path, list[ImageRecord]]
RunCommand = Callable[..., subprocess.CompletedProcess[str]]
# What turns a recipe for 8 GPUs into one for a CPU and a model of a hundred thousand parameters.
CPU_OVERRIDES: dict[str, object] = {
    "deepspeed": None,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "save_steps": 1000,
    "plot_loss": False,
    "dataloader_num_workers": 0,
    "learning_rate": 1.0e-3,
    "warmup_ratio": 0.0,
    "image_max_pixels": 8192,
    "ddp_timeout": 120,
}


@dataclass(frozen=True)
class Workshop:
    """Folders that the tests of training share; nothing in them may be changed."""

    root: Path
    dataset_dir: Path
    images: Path
    model: Path
    other_model: Path

    def list_overrides(self, stage: int, output: Path, /, **changes: object) -> dict[str, object]:
        """Return the overrides that run a stage's recipe on a CPU with the tiny data and model."""
        inputs: dict[str, object] = {"model_name_or_path": str(self.model), "dataset_dir": str(self.dataset_dir)}
        if stage == 2:
            inputs["chatreid_encoder"] = str(self.other_model)
        return CPU_OVERRIDES | inputs | {"output_dir": str(output)} | changes


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Write a world of twelve people, records of all stages, and two tiny models with different weights."""
    from chatreid_plugin.config import BuildSettings
    from chatreid_plugin.demo.people import sample_people
    from chatreid_plugin.demo.tiny_model import TinySizes, write_tiny_model
    from chatreid_plugin.demo.world import write_world
    from chatreid_plugin.engine.build import build_datasets

    root = tmp_path_factory.mktemp("workshop")
    write_world(root / "world", train_people=10, test_people=2, cameras=2, images_per_camera=2)
    settings = BuildSettings.model_validate(
        {
            "sources": [
                {
                    "name": "world",
                    "parser": "market1501",
                    "root": root / "world",
                    "captions": root / "world" / "captions.jsonl",
                    "allow_count_mismatch": True,
                }
            ],
            "manifest_dir": root / "manifests",
            "output_dir": root / "dataset_info",
            "records": {"stage1": 16, "stage2": 70, "stage3": 16},
            "gallery": {"min_size": 2, "max_size": 4},
        }
    )
    build_datasets(settings)
    sizes = TinySizes(hidden=32, layers=2, heads=2, vision_hidden=32, vision_layers=2, patch_size=14, vocabulary=600)
    people = sample_people(20, 7)
    write_tiny_model(root / "model", people, sizes=sizes, seed=1)
    write_tiny_model(root / "other_model", people, sizes=sizes, seed=2)
    return Workshop(root, root / "dataset_info", root / "world", root / "model", root / "other_model")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny Qwen2-VL to score with; nothing in it may be changed."""
    from chatreid_plugin.demo.people import sample_people
    from chatreid_plugin.demo.tiny_model import TinySizes, write_tiny_model

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_tiny_model(folder, sample_people(20, 0), sizes=TinySizes(hidden=64, layers=2, vision_layers=1))
    return folder


@pytest.fixture(scope="session")
def write_noise(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[tuple[int, int]]], Crops]:
    """Return a function that writes an image of noise of each size; it returns their folder and records."""
    import numpy as np
    from PIL import Image

    def write(sizes: Sequence[tuple[int, int]]) -> Crops:
        root = tmp_path_factory.mktemp("noise")
        rng = np.random.default_rng(3)
        records: list[ImageRecord] = []
        for index, (width, height) in enumerate(sizes):
            name = f"{index}.png"
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / name)
            records.append(ImageRecord(f"t/{index}", "t", "gallery", name, f"t:{index}", str(index), width, height))
        return root, records

    return write


@pytest.fixture(scope="session")
def llamafactory_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment variables for ``llamafactory-cli`` of this environment and this tree."""
    hidden = ("CHATREID_PLUGIN", "FORCE_TORCHRUN", "ALLOW_EXTRA_ARGS", "NPROC_PER_NODE", "PYTHONPATH")
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    scripts = Path(sys.executable).parent
    cache = tmp_path_factory.mktemp("datasets_cache")
    return clean | {
        "PATH": os.pathsep.join([str(scripts), clean.get("PATH", "")]),
        "PYTHONPATH": str(REPOSITORY),  # this tree, also where another one is installed
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="session")
def fast_programs(
    llamafactory_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Return a folder with a ``python``, a ``llamafactory-cli`` and a ``torchrun`` that start in no time.

    They run in forks of ``command_server.py``.
    """
    folder = tmp_path_factory.mktemp("programs")
    address = folder / "socket"
    write_python(folder / "python", address)
    write_python(folder / "llamafactory-cli", address, ("-m", "llamafactory.cli"))
    write_python(folder / "torchrun", address, ("-m", "torch.distributed.run"))
    server = [sys.executable, str(Path(__file__).with_name("command_server.py")), str(address)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(server, env=llamafactory_environment, stdout=log, stderr=log)
    while not address.exists():
        assert process.poll() is None, (folder / "log").read_text()[-4000:]
        time.sleep(0.01)
    yield folder
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def fast_environment(llamafactory_environment: dict[str, str], fast_programs: Path) -> dict[str, str]:
    """Return the environment variables for commands that start fast, and so do the processes of their torchrun."""
    path = os.pathsep.join([str(fast_programs), llamafactory_environment["PATH"]])
    return llamafactory_environment | {"PATH": path, "PYTHON_EXEC": str(fast_programs / "python")}


@pytest.fixture(scope="session")
def run_command(fast_programs: Path, fast_environment: dict[str, str]) -> RunCommand:
    """Return a function that runs ``python ...`` or ``llamafactory-cli ...`` as ``subprocess.run`` does, but fast."""

    def run(
        command: Sequence[str | Path], cwd: Path = REPOSITORY, env: dict[str, str] | None = None, timeout: int = 250
    ) -> subprocess.CompletedProcess[str]:
        name = "python" if command[0] == sys.executable else Path(command[0]).name
        options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "timeout": timeout}
        line = [str(fast_programs / name), *map(str, command[1:])]
        return subprocess.run(line, cwd=cwd, env=fast_environment | (env or {}), check=False, **options)

    return run


@pytest.fixture(scope="session")
def run_llamafactory(llamafactory_environment: dict[str, str], run_command: RunCommand) -> RunCommand:
    """Return a function that runs ``llamafactory-cli`` of this environment in the repository's root.

    Where the plugin is switched off it is a process of its own, since that is read on import.
    """
    program = str(Path(sys.executable).parent / "llamafactory-cli")

    def run(
        *arguments: str | Path, overrides: dict[str, object] | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        values = [f"{key}={'null' if value is None else value}" for key, value in (overrides or {}).items()]
        command = [program, *map(str, arguments), *values]
        if "CHATREID_PLUGIN" not in environment:
            return run_command(command, env=environment)
        variables = llamafactory_environment | environment
        options: dict[str, Any] = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 250}
        return subprocess.run(command, env=variables, check=False, **options)

    return run


@pytest.fixture(scope="session")
def split_commands() -> Callable[[int], list[list[str]]]:
    """Return a function that lists the commands of eval/README.md's "A model a split", for so many splits of each."""
    text = (REPOSITORY / "eval" / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^## A model a split$.*?```bash\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    script = found.group(1)

    def list_commands(splits: int) -> list[list[str]]:
        stubs = [f'{name}() {{ echo {name} "$@"; }}' for name in ("chatreid", "llamafactory-cli")]
        stubs.append(f'seq() {{ command seq "$(($1 < {splits} ? $1 : {splits}))"; }}')
        run = ["bash", "-euc", "\n".join([*stubs, script])]
        result = subprocess.run(run, capture_output=True, text=True, timeout=20, check=True)
        return [line.split() for line in result.stdout.splitlines()]

    return list_commands


class Page(HTMLParser):
    """Collects tags with their attributes and the text, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def find(self, tag: str, kind: str = "") -> list[dict[str, Any]]:
        return [values for name, values in self.tags if name == tag and kind in (values.get("class") or "")]


@pytest.fixture
def parse_page() -> Callable[[str], Page]:
    """Return a function that parses a page."""
    return Page


# Path, headers with names in lower case, and JSON body (None for a GET) -> status, body, and where a test wants them
# further headers, and whether the connection is cut half-way.
Answer = Callable[[str, dict[str, str], Any], tuple[Any, ...]]


class FakeHandler(BaseHTTPRequestHandler):
    """Sends what ``answer``, which a subclass has, says."""

    answer: Answer

    def do_GET(self) -> None:
        self.reply(None)

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: Any) -> None:
        self.send(*self.answer(self.path, {name.lower(): value for name, value in self.headers.items()}, body))

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) + 100 * cut))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            pass  # the client has given up, as it should


@pytest.fixture
def serve_answers() -> Iterator[Callable[[Answer], str]]:
    """Return a function that serves answers on a real socket, each in a thread of its own; it returns the base URL."""
    running: list[ThreadingHTTPServer] = []

    def serve(answer: Answer) -> str:
        handler = type("Handler", (FakeHandler,), {"answer": staticmethod(answer)})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/v1"

    yield serve
    for server in running:
        server.shutdown()
        server.server_close()


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
def make_image() -> Callable[..., Path]:
    """Return a function that writes an image file, whatever its name says of the format."""

    def make(path: Path, size: tuple[int, int] = (32, 64), format: str = "JPEG") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Noise, so that the file is longer than its header and can be cut short.
        Image.effect_noise(size, 50).convert("RGB").save(path, format=format)
        return path

    return make

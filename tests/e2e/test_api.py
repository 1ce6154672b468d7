"""``chatreid caption`` and ``backend: http`` against one ``llamafactory-cli api``, which has no log-probabilities."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.datasets.benchmark import make_image_query
from chatreid_plugin.engine.captions.endpoint import caption_images
from chatreid_plugin.engine.manifests import parse_sources
from chatreid_plugin.errors import DataError, UpstreamError
from chatreid_plugin.eval.backends.http import HttpScorer
from chatreid_plugin.openai_client import READINGS
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import read_manifest
from tests.support import make_eval_settings


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("llamafactory-api")]
KEY = "sk-local-0123456789"
IMAGES = 4
Server = tuple[str, Path]


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_server(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a server takes requests; a request without the key is refused, which will do."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{url}/models", timeout=5)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"The server does not start: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def server(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve the tiny model; return the base URL and the log, which holds every request."""
    folder = tmp_path_factory.mktemp("api")
    recipe = folder / "api.yaml"
    values = {"model_name_or_path": str(workshop.model), "template": "chatreid", "max_new_tokens": 8}
    recipe.write_text(yaml.safe_dump(values | {"infer_dtype": "float32", "image_max_pixels": 8192}))
    port = find_free_port()
    environment = {name: value for name, value in os.environ.items() if name != "CHATREID_PLUGIN"}
    environment |= {
        "API_HOST": "127.0.0.1",
        "API_PORT": str(port),
        "API_KEY": KEY,
        "API_VERBOSE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(Path(sys.executable).parent / "llamafactory-cli"), "api", str(recipe)]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_for_server(f"http://127.0.0.1:{port}/v1", process, log)
            yield f"http://127.0.0.1:{port}/v1", log
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture
def make(workshop: Any, server: Server, tmp_path: Path) -> Callable[..., BuildSettings]:
    """Return a function that parses the world and makes a recipe which captions it with that server."""

    def make(**captioning: Any) -> BuildSettings:
        block = {"base_url": server[0], "model": "tiny", "api_key_variable": "CHATREID_TEST_KEY", "concurrency": 2}
        source = {"name": "world", "parser": "market1501", "root": workshop.images, "allow_count_mismatch": True}
        values = {"sources": [source], "manifest_dir": tmp_path / "manifests", "records": {"stage1": 1}}
        settings = BuildSettings.model_validate(values | {"captioning": block | captioning})
        parse_sources(settings)
        return settings

    return make


def test_images_arrive_and_random_words_are_failures_with_reasons(
    make: Callable[..., BuildSettings],
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CHATREID_TEST_KEY", KEY)
    settings = make(max_failures=1)
    seen = len(server[1].read_text(errors="replace"))
    report = caption_images(settings, limit=IMAGES).values["sources"][0]
    assert (report["answered"], report["failed"]) == (0, IMAGES)
    # LLaMA-Factory takes a JSON schema and ignores it, so the schema is asked for in words.
    assert "does not keep to a JSON schema" in capsys.readouterr().err
    lines = (tmp_path / "manifests" / "world.caption_failures.jsonl").read_text().splitlines()
    failures = {line["path"]: line["reason"] for line in map(json.loads, lines)}
    assert len(failures) == IMAGES
    assert all(reason.startswith("broken JSON: ") for reason in failures.values())
    log = server[1].read_text(errors="replace")[seen:]
    records, root = read_manifest(tmp_path / "manifests" / "world.parquet")
    assert set(failures) <= {record.path for record in records if record.split == "train"}
    for path in failures:
        assert log.count(base64.b64encode((root / path).read_bytes()).decode()) == READINGS
    assert log.count('"POST /v1/chat/completions HTTP/1.1" 200') == 1 + IMAGES * READINGS
    assert "provided, can you give a detailed description of the pedestrian, including their gender" in log


def test_too_many_failures_stop_the_run(make: Callable[..., BuildSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATREID_TEST_KEY", KEY)
    with pytest.raises(DataError, match=r"1 of 4 images have no answer(.|\n)*: broken JSON: "):
        caption_images(make(concurrency=1), limit=IMAGES)


def test_wrong_key_is_one_error(make: Callable[..., BuildSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATREID_TEST_KEY", "sk-wrong")
    with pytest.raises(UpstreamError, match=r"refuses the key \(401: .*CHATREID_TEST_KEY") as caught:
        caption_images(make())
    assert "sk-wrong" not in str(caught.value)


@pytest.fixture
def score(workshop: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., HttpScorer]:
    """Return a function that makes a scorer which asks that server."""
    monkeypatch.setenv("CHATREID_TEST_KEY", KEY)

    def make(**changes: Any) -> HttpScorer:
        values = {"protocol": "folder", "manifest": "m.parquet", "output_dir": tmp_path, "backend": "http"}
        values["filter"] = "none"
        values |= {"base_url": server[0], "api_key_variable": "CHATREID_TEST_KEY", "image_max_pixels": 8192}
        settings = make_eval_settings(values | changes)
        return HttpScorer(settings.server, settings.model, workshop.images)

    return make


def list_crops(workshop: Any) -> list[ImageRecord]:
    paths = sorted((workshop.images / "bounding_box_train").glob("*.jpg"))[:4]
    names = [str(path.relative_to(workshop.images)) for path in paths]
    return [ImageRecord(f"w/{name}", "w", "gallery", name, f"w:{name}", "1", 64, 128) for name in names]


def test_scores_degrade_to_hard_answers(
    workshop: Any, server: Server, score: Callable[..., HttpScorer], caplog: pytest.LogCaptureFixture
) -> None:
    crops = list_crops(workshop)
    seen = len(server[1].read_text(errors="replace"))
    scorer = score()
    assert scorer.confidence == "answers" and "gives no log-probabilities" in caplog.text
    scores = scorer.score_pairs(make_image_query(crops[0]), crops[1:], "image_to_image_one_to_one")
    assert set(scores.tolist()) <= {0.0, 0.5, 1.0}
    # Random words: what says neither Yes nor No is counted.
    assert scorer.filled == scores.tolist().count(0.5)
    letters = scorer.choose(make_image_query(crops[0]), [crops[1:]], "standard_reid")[0]
    assert set(letters.tolist()) <= {0.0, 1.0}
    log = server[1].read_text(errors="replace")[seen:]
    assert "contain the same pedestrian identity?" in log
    assert log.count("data:image/png;base64,") >= 2 * 3


def test_votes_are_sampled_answers_of_one_request(
    workshop: Any, server: Server, score: Callable[..., HttpScorer]
) -> None:
    crops = list_crops(workshop)
    scorer = score(votes=4)
    assert scorer.traits.several_choices
    seen = len(server[1].read_text(errors="replace"))
    scores = scorer.score_pairs(make_image_query(crops[0]), crops[1:3], "image_to_image_one_to_one")
    assert set((8 * scores).tolist()) <= set(range(9))
    assert server[1].read_text(errors="replace")[seen:].count('"POST /v1/chat/completions HTTP/1.1" 200') == 2

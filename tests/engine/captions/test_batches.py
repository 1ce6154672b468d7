"""Tests of chatreid_plugin.engine.captions.batches: request files, their limits, and answers read back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.captions import batches
from chatreid_plugin.engine.captions.endpoint import caption_sources
from chatreid_plugin.errors import DataError


NAMES = [f"{number:03d}.jpg" for number in range(6)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def list_requests(directory: Path) -> list[dict[str, Any]]:
    return [line for path in sorted(directory.iterdir()) for line in read_lines(path)]


def write_output(path: Path, *lines: tuple[str, int, Any]) -> Path:
    """Write an output file as OpenAI does: (image, status, body) a line."""
    rows = [
        {
            "id": f"batch_req_{name}",
            "custom_id": f"own/{name}",
            "response": {"status_code": status, "request_id": "r", "body": body},
            "error": None,
        }
        for name, status, body in lines
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_round_trip(
    endpoint: Any, make_captioning: Callable[..., BuildSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_captioning(max_failures=0.5)
    monkeypatch.delenv("CHATREID_TEST_KEY")  # files need no key
    caption_sources(settings, batch_write=tmp_path / "batches")
    assert [path.name for path in (tmp_path / "batches").iterdir()] == ["own-0000.jsonl"]
    requests = list_requests(tmp_path / "batches")
    assert [request["custom_id"] for request in requests] == [f"own/{name}" for name in NAMES]
    assert {(request["method"], request["url"]) for request in requests} == {("POST", "/v1/chat/completions")}
    good = [(name, 200, endpoint.reply(name, 0).body) for name in NAMES[:3]]
    refused = ("003.jpg", 200, endpoint.make_completion(None, "No."))
    output = write_output(tmp_path / "output.jsonl", *good[::-1], refused)
    errors = write_output(tmp_path / "errors.jsonl", ("004.jpg", 400, {"error": {"message": "too large"}}))
    expired = {"code": "batch_expired", "message": "This request could not be executed in time."}
    with errors.open("a") as file:
        file.write(json.dumps({"custom_id": "own/005.jpg", "response": None, "error": expired}) + "\n")
    report = caption_sources(settings, batch_read=[output, errors])
    assert endpoint.asked == []
    answers = {line["path"]: line["captions"] for line in read_lines(tmp_path / "manifests" / "own.captions.jsonl")}
    assert answers == {name: [f"Seen in {name}."] for name in NAMES[:3]}
    failures = {
        line["path"]: line["reason"] for line in read_lines(tmp_path / "manifests" / "own.caption_failures.jsonl")
    }
    assert failures == {
        "003.jpg": "refusal: No.",
        "004.jpg": "400: too large",
        "005.jpg": "no response: This request could not be executed in time.",
    }
    assert (report.values["sources"][0]["answered"], report.values["sources"][0]["failed"]) == (3, 3)
    caption_sources(settings, batch_write=tmp_path / "again")
    assert [request["custom_id"] for request in list_requests(tmp_path / "again")] == [f"own/{n}" for n in NAMES[3:]]


def test_batch_asks_the_same_as_the_endpoint(
    endpoint: Any, make_captioning: Callable[..., BuildSettings], tmp_path: Path
) -> None:
    settings = make_captioning(images=1)
    caption_sources(settings, batch_write=tmp_path / "batches")
    caption_sources(settings)
    sent = {key: value for key, value in endpoint.bodies[-1].items() if key != "url"}
    assert list_requests(tmp_path / "batches")[0]["body"] == sent


@pytest.mark.parametrize(("limit", "value"), [("MOST_REQUESTS", 4), ("MOST_BYTES", None)])
def test_files_are_split_at_the_limits(
    make_captioning: Callable[..., BuildSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: int | None,
) -> None:
    settings = make_captioning()
    caption_sources(settings, batch_write=tmp_path / "one")
    sizes = [len(line) for line in (tmp_path / "one" / "own-0000.jsonl").read_bytes().splitlines(keepends=True)]
    monkeypatch.setattr(batches, limit, value or sum(sizes[:4]))
    report = caption_sources(settings, batch_write=tmp_path / "two")
    files = sorted((tmp_path / "two").iterdir())
    assert [len(read_lines(path)) for path in files] == [4, 2]
    assert [file["requests"] for file in report.values["files"]] == [4, 2]
    assert b"".join(path.read_bytes() for path in files) == (tmp_path / "one" / "own-0000.jsonl").read_bytes()


def test_killed_command_goes_on_with_the_next_file(
    make_captioning: Callable[..., BuildSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_captioning()
    monkeypatch.setattr(batches, "MOST_REQUESTS", 2)
    caption_sources(settings, batch_write=tmp_path / "batches", limit=4)
    (tmp_path / "batches" / ".own-0002.jsonl.77.tmp").write_text('{"custom_id": "own/00')
    report = caption_sources(settings, batch_write=tmp_path / "batches")
    assert report.values["asked_before"] == 4
    (tmp_path / "batches" / ".own-0002.jsonl.77.tmp").unlink()
    assert [request["custom_id"] for request in list_requests(tmp_path / "batches")] == [f"own/{n}" for n in NAMES]
    assert caption_sources(settings, batch_write=tmp_path / "batches").values["files"] == []


def test_unreadable_image_is_left_out_and_named(make_captioning: Callable[..., BuildSettings], tmp_path: Path) -> None:
    settings = make_captioning()
    (tmp_path / "crops" / "001.jpg").write_bytes(b"")
    report = caption_sources(settings, batch_write=tmp_path / "batches")
    assert len(list_requests(tmp_path / "batches")) == 5
    assert "001.jpg cannot be read" in report.values["unreadable"][0]


def test_answers_are_read_once(endpoint: Any, make_captioning: Callable[..., BuildSettings], tmp_path: Path) -> None:
    settings = make_captioning()
    output = write_output(tmp_path / "output.jsonl", ("001.jpg", 200, endpoint.reply("first", 0).body))
    caption_sources(settings, batch_read=[output, output])
    write_output(output, ("001.jpg", 200, endpoint.reply("second", 0).body))
    caption_sources(settings, batch_read=[output, output])
    lines = read_lines(tmp_path / "manifests" / "own.captions.jsonl")
    assert [line["captions"] for line in lines] == [["Seen in first."]]


def test_output_of_another_recipe_is_refused_before_anything_is_written(
    endpoint: Any, make_captioning: Callable[..., BuildSettings], tmp_path: Path
) -> None:
    settings = make_captioning()
    body = endpoint.reply("x", 0).body
    output = write_output(tmp_path / "output.jsonl", ("001.jpg", 200, body), ("999.jpg", 200, body))
    with pytest.raises(DataError, match=r"output\.jsonl, line 2: custom_id 'own/999\.jpg'"):
        caption_sources(settings, batch_read=[output])
    assert not (tmp_path / "manifests" / "own.captions.jsonl").exists()


def test_too_many_failures_are_an_error_but_the_answers_stay(
    endpoint: Any, make_captioning: Callable[..., BuildSettings], tmp_path: Path
) -> None:
    settings = make_captioning(max_failures=0.1)
    good = ("001.jpg", 200, endpoint.reply("x", 0).body)
    output = write_output(tmp_path / "output.jsonl", ("000.jpg", 500, None), good)
    with pytest.raises(DataError, match="1 of 2 images have no answer"):
        caption_sources(settings, batch_read=[output])
    assert len(read_lines(tmp_path / "manifests" / "own.captions.jsonl")) == 1

"""Tests of chatreid_plugin.engine.captions against a real local server: what is asked, at what pace, and written."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.captions.endpoint import caption_images, caption_sources
from chatreid_plugin.engine.captions.jobs import open_log
from chatreid_plugin.engine.manifests import attach_annotations
from chatreid_plugin.errors import ConfigError, DataError, UpstreamError
from chatreid_plugin.shards import read_manifest
from chatreid_plugin.tasks import get_task


NAMES = [f"{number:03d}.jpg" for number in range(6)]
KEY = "sk-test-0123456789"
MakeRecipe = Callable[..., BuildSettings]
ReadAnswers = Callable[[], dict[str, Any]]
ReadFailures = Callable[[], dict[str, str]]


def test_every_training_image_is_asked_about_once(
    api: Any, make: MakeRecipe, tmp_path: Path, read_answers: ReadAnswers
) -> None:
    settings = make()
    report = caption_images(settings)
    assert sorted(api.images) == NAMES
    answers = read_answers()
    assert sorted(answers) == NAMES
    assert answers["003.jpg"]["captions"] == ["Seen in 003.jpg."]
    assert answers["003.jpg"]["attributes"]["upper_colour"] == "black"
    assert answers["003.jpg"]["model"] == "gpt-4o"
    assert report.values["sources"][0] == {
        "source": "own",
        "images": 6,
        "answered_before": 0,
        "answered": 6,
        "occluded": 0,
        "failed": 0,
        "captions": str(tmp_path / "manifests" / "own.captions.jsonl"),
    }
    assert not (tmp_path / "manifests" / "own.caption_failures.jsonl").exists()
    records, _ = read_manifest(tmp_path / "manifests" / "own.parquet")
    described, dropped = attach_annotations(records, tmp_path / "manifests" / "own.captions.jsonl")
    assert dropped == 0
    assert [len(record.captions) for record in described] == [1] * 6 + [0]


def test_request_holds_the_papers_prompt_the_file_and_the_schema(
    api: Any, make: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    caption_images(make(images=1, extra_body={"temperature": 0.5}))
    body, headers = api.bodies[-1], api.headers[-1]
    assert body["url"] == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"]) == ("gpt-4o", 0.5)
    first, image, last = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert image["image_url"]["detail"] == "low"
    assert get_task("image_captioning").prompts[0] in first["text"] + "{image}" + last["text"]
    assert body["response_format"]["json_schema"]["strict"] is True
    assert set(body["response_format"]["json_schema"]["schema"]["required"]) == {
        "descriptions",
        "attributes",
        "clothing_recognised",
    }
    assert "Sending" not in capsys.readouterr().err  # to this machine: nobody has to be told


def test_images_go_to_another_machine_only_after_saying_so(
    api: Any, make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("chatreid_plugin.engine.captions.endpoint.is_local", lambda url: False)
    caption_images(make())
    error = capsys.readouterr().err
    host = api.base_url.removeprefix("http://").removesuffix("/v1")
    assert f"Sending 6 images of people to {host} (model gpt-4o)" in error
    assert "In the <crop, detail: low> provided, can you give a detailed description" in error


def test_missing_key_is_refused_before_anything_is_sent(make: MakeRecipe, tmp_path: Path) -> None:
    settings = make(base_url="https://captions.invalid/v1", api_key_variable="NO_SUCH_VARIABLE")
    with pytest.raises(ConfigError, match=r"NO_SUCH_VARIABLE .* is not set.*captions\.invalid"):
        caption_images(settings)
    assert not (tmp_path / "manifests" / "own.captions.jsonl").exists()


def test_key_with_a_line_break_inside_is_not_shown(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATREID_TEST_KEY", "sk-one\nsk-two")
    with pytest.raises(ConfigError) as caught:
        caption_images(make())
    assert "CHATREID_TEST_KEY" in str(caught.value) and "sk-" not in str(caught.value)


def test_next_run_asks_only_about_what_has_no_answer(
    api: Any, make: MakeRecipe, tmp_path: Path, read_answers: ReadAnswers, read_failures: ReadFailures
) -> None:
    settings = make(max_failures=1)
    api.misbehave("002.jpg", 3, body=api.make_completion("no"))
    caption_images(settings, limit=4)
    assert sorted(set(api.images)) == NAMES[:4]
    path = tmp_path / "manifests" / "own.captions.jsonl"
    complete_lines = path.read_bytes()
    path.write_bytes(complete_lines + b'{"path": "004.jpg", "capt')  # a kill in the middle of a line
    before = len(api.images)
    report = caption_images(settings)
    assert sorted(api.images[before:]) == ["002.jpg", "004.jpg", "005.jpg"]
    assert sorted(read_answers()) == NAMES
    assert path.read_bytes().startswith(complete_lines)
    assert read_failures() == {}
    assert report.values["sources"][0]["answered_before"] == 3
    requests = len(api.asked)
    assert caption_images(settings).values["sources"][0]["answered_before"] == 6
    assert len(api.asked) == requests


def test_two_runs_at_once_are_refused(make: MakeRecipe, api: Any, tmp_path: Path) -> None:
    settings = make()
    path = tmp_path / "manifests" / "own.captions.jsonl"
    with open_log(path, keep=True), pytest.raises(DataError, match="Another `chatreid caption` is writing"):
        caption_images(settings)
    assert api.asked == []


def test_never_more_requests_at_once_than_allowed(api: Any, make: MakeRecipe) -> None:
    good = api.reply
    api.reply = lambda name, before: replace(good(name, before), delay=0.05)
    caption_images(make(images=12, concurrency=3))
    assert api.most_active == 3


def test_requests_per_minute_are_kept(api: Any, make: MakeRecipe) -> None:
    caption_images(make(requests_per_minute=600))
    gaps = [second - first for first, second in zip(api.times, api.times[1:], strict=False)]
    assert len(gaps) == 6
    assert sum(gaps) >= 0.58  # the clocks of sender and server are the same, but a request takes time to arrive


def test_key_is_neither_written_nor_shown(
    api: Any,
    make: MakeRecipe,
    tmp_path: Path,
    read_answers: ReadAnswers,
    read_failures: ReadFailures,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def echo(status: int, **changes: Any) -> dict[str, Any]:
        return {"status": status, "body": {"error": {"message": f"Incorrect API key: {KEY}"}}} | changes

    api.misbehave("001.jpg", 99, **echo(400))
    api.misbehave("002.jpg", 99, **echo(429, headers={"Retry-After": "0"}))
    # Reasons are cut after 120 characters, here in the middle of the key.
    api.misbehave("003.jpg", 99, body=api.make_completion(f"{'x' * 110} {KEY}"))
    api.misbehave("005.jpg", 99, body=api.make_completion(api.make_description(f"A man with {KEY}.")))
    api.misbehave("004.jpg", 99, **echo(500))
    settings = make(retries=1, max_failures=1)
    print(caption_images(settings).to_json())
    assert len(read_failures()) == 4
    api.misbehave("probe", 99, **echo(401))
    with pytest.raises(UpstreamError) as caught:
        caption_images(settings)
    print(caught.value)
    shown = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "[key]" in shown.out and "all requests wait" in shown.err
    assert KEY[:8] not in shown.out + shown.err and KEY[:8].encode() not in written
    assert read_answers()["005.jpg"]["captions"] == ["A man with [key]."]
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in api.headers)


@pytest.mark.parametrize("refused", [True, False], ids=["status 400", "silently ignored"])
def test_endpoint_without_json_schema_is_asked_in_words(
    api: Any, make: MakeRecipe, read_answers: ReadAnswers, refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(name: str, before: int) -> Any:
        if "response_format" in api.bodies[-1]:
            return api.make_reply(api.make_completion("I see a grey area."), status=400 if refused else 200)
        text = f"<think>a {{brace}}</think>\n```json\n{api.make_description()}\n```"
        return api.make_reply(api.make_completion(text))

    api.reply = reply
    caption_images(make(concurrency=1))
    assert sorted(read_answers()) == NAMES
    assert api.asked.count("probe") == 1 + refused
    assert "response_format" not in api.bodies[-1]
    assert '"upper_colour": {"type": "string"' in api.bodies[-1]["messages"][0]["content"][-1]["text"]
    assert "does not keep to a JSON schema" in capsys.readouterr().err


def test_images_with_unrecognised_clothing_are_marked_as_occluded(
    api: Any, make: MakeRecipe, read_answers: ReadAnswers
) -> None:
    text = json.dumps({"descriptions": [], "attributes": {}, "clothing_recognised": False})
    api.misbehave("005.jpg", 1, body=api.make_completion(text))
    report = caption_images(make())
    expected = {"path": "005.jpg", "captions": [], "attributes": {}, "clothing_recognised": False, "model": "gpt-4o"}
    assert read_answers()["005.jpg"] == expected
    assert report.values["sources"][0]["occluded"] == 1
    assert "clothing_recognised" not in read_answers()["004.jpg"]


def test_several_captions_for_each_image(api: Any, make: MakeRecipe, read_answers: ReadAnswers) -> None:
    caption_images(make(captions_per_image=2))
    assert read_answers()["000.jpg"]["captions"] == ["Seen in 000.jpg.", "Again: Seen in 000.jpg."]
    assert "2 descriptions" in api.bodies[-1]["messages"][0]["content"][-1]["text"]


def test_dry_run_sends_and_writes_nothing(api: Any, make: MakeRecipe, tmp_path: Path) -> None:
    settings = make(api_key_variable="NO_SUCH_VARIABLE")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    report = caption_sources(settings, dry_run=True)
    assert api.asked == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert report.values["sources"] == [{"source": "own", "images": 6, "answered": 0, "waiting": 6}]
    assert "can you give a detailed description of the pedestrian" in report.render()


def test_two_ways_at_once_are_refused(make: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of --dry-run"):
        caption_sources(make(), dry_run=True, batch_write=tmp_path)


def test_recipe_without_the_block_and_unknown_source_are_refused(make: MakeRecipe) -> None:
    settings = make()
    with pytest.raises(ConfigError, match="no source other; it has own"):
        caption_images(settings, ["other"])
    with pytest.raises(ConfigError, match="no `captioning` block"):
        caption_images(settings.model_copy(update={"captioning": None}))


def test_source_that_trains_nothing_is_left_alone_unless_named(api: Any, make: MakeRecipe) -> None:
    settings = make()
    tested = settings.model_copy(update={"sources": (settings.sources[0].model_copy(update={"stages": ()}),)})
    assert caption_images(tested).values == {"sources": []}
    assert api.asked == []
    caption_images(tested, ["own"])
    assert len(api.images) == 6


def test_slow_answers_do_not_hold_up_the_others(api: Any, make: MakeRecipe) -> None:
    good = api.reply
    release = threading.Event()

    def reply(name: str, before: int) -> Any:
        if name == "000.jpg":
            release.wait(5)
        elif len(api.images) == 6:
            release.set()
        return good(name, before)

    api.reply = reply
    start = time.monotonic()
    caption_images(make(concurrency=2))
    assert time.monotonic() - start < 4

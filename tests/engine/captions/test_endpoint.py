"""Tests of chatreid_plugin.engine.captions against a real local server that misbehaves on purpose."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.annotations import attach_annotations
from chatreid_plugin.engine.captions import endpoint
from chatreid_plugin.engine.captions.endpoint import caption_images, caption_sources
from chatreid_plugin.engine.captions.jobs import open_log
from chatreid_plugin.errors import ConfigError, DataError, UpstreamError
from chatreid_plugin.shards import read_manifest
from chatreid_plugin.tasks import get_task


NAMES = [f"{number:03d}.jpg" for number in range(6)]
KEY = "sk-test-0123456789"
MakeRecipe = Callable[..., BuildSettings]


@pytest.fixture
def make(make_captioning: MakeRecipe) -> MakeRecipe:
    return make_captioning


@pytest.fixture
def api(endpoint: Any) -> Any:
    return endpoint


def read_answers(tmp_path: Path) -> dict[str, Any]:
    """Return path -> line of the captions file, each path once."""
    lines = [json.loads(line) for line in (tmp_path / "manifests" / "own.captions.jsonl").read_text().splitlines()]
    assert len({line["path"] for line in lines}) == len(lines)
    return {line["path"]: line for line in lines}


def read_failures(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "manifests" / "own.caption_failures.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["path"]: line["reason"] for line in lines}


def test_every_training_image_is_asked_about_once(api: Any, make: MakeRecipe, tmp_path: Path) -> None:
    settings = make()
    report = caption_images(settings)
    assert sorted(api.images) == NAMES
    answers = read_answers(tmp_path)
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


def test_429_pauses_all_workers_for_the_time_asked(api: Any, make: MakeRecipe, tmp_path: Path) -> None:
    api.misbehave("000.jpg", 1, status=429, headers={"Retry-After": "1"}, body={"error": {"message": "slow down"}})
    caption_images(make(images=12, concurrency=2))
    refused = api.times[api.asked.index("000.jpg")]
    # The other worker may have a request on its way when the 429 comes.
    assert not [moment for moment in api.times if refused + 0.3 < moment < refused + 0.95]
    assert len([moment for moment in api.times if moment > refused + 0.95]) >= 8
    assert len(read_answers(tmp_path)) == 12


def test_retry_after_beyond_the_minute_limits_stops(api: Any, make: MakeRecipe) -> None:
    api.misbehave("000.jpg", 1, status=429, headers={"Retry-After": "86400"})
    with pytest.raises(UpstreamError, match="wants no request for 1440 minutes"):
        caption_images(make())


@pytest.mark.parametrize(
    "changes",
    [
        {"status": 429},
        {"status": 500},
        {"status": 502, "body": b"<html>Bad gateway</html>", "headers": {"Content-Type": "text/html"}},
        {"status": 503, "headers": {"Retry-After": "0"}},
        {"delay": 1.0},
        {"body": b'{"choices": [', "cut": True},
    ],
    ids=["429", "500", "502", "503", "hang", "cut connection"],
)
def test_passing_faults_are_retried(api: Any, make: MakeRecipe, tmp_path: Path, changes: dict[str, Any]) -> None:
    api.misbehave("002.jpg", 2, **changes)
    report = caption_images(make(timeout=0.4))
    assert api.images.count("002.jpg") == 3
    assert len(api.images) == 8
    assert sorted(read_answers(tmp_path)) == NAMES
    assert report.values["sources"][0]["failed"] == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": 500, "body": {"error": {"message": "out of memory"}}}, "500: out of memory"),
        ({"delay": 0.6}, "no answer within 0.3 s"),
        ({"body": b"{", "cut": True}, "the connection failed"),
    ],
)
def test_lasting_faults_are_failures_after_all_retries(
    api: Any, make: MakeRecipe, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    api.misbehave("002.jpg", 99, **changes)
    caption_images(make(timeout=0.3, retries=2, max_failures=0.2))
    assert api.images.count("002.jpg") == 3
    assert sorted(read_answers(tmp_path)) == [name for name in NAMES if name != "002.jpg"]
    assert list(read_failures(tmp_path)) == ["002.jpg"]
    assert reason in read_failures(tmp_path)["002.jpg"]


def list_unreadable(api: Any) -> dict[str, dict[str, Any]]:
    """Return answers that hold no description."""
    answer = json.loads(api.make_description())
    return {
        "broken JSON: Sure! {": {"body": api.make_completion("Sure! {")},
        "broken JSON": {"body": b'{"choices": [{'},
        "refusal: I cannot help": {"body": api.make_completion(None, "I cannot help with that.")},
        "no chat completion: <html>": {"body": b"<html>", "headers": {"Content-Type": "text/html"}},
        "no chat completion": {"body": {"choices": []}},
        "wrong schema: attributes": {"body": api.make_completion(json.dumps(answer | {"attributes": None}))},
        "wrong schema: 0 descriptions": {"body": api.make_completion(json.dumps(answer | {"descriptions": [" "]}))},
        "wrong schema: clothing_recognised": {"body": api.make_completion('{"clothing_recognised": "yes"}')},
        "wrong schema: attribute upper_colour has the value 'plaid'": {
            "body": api.make_completion(
                json.dumps(answer | {"attributes": answer["attributes"] | {"upper_colour": "plaid"}})
            )
        },
    }


@pytest.mark.parametrize("number", range(9))
def test_unreadable_answers_are_asked_for_again_then_fail(
    api: Any, make: MakeRecipe, tmp_path: Path, number: int
) -> None:
    reason, changes = list(list_unreadable(api).items())[number]
    api.misbehave("001.jpg", endpoint.READINGS - 1, **changes)
    api.misbehave("004.jpg", 99, **changes)
    caption_images(make(max_failures=0.2))
    assert api.images.count("001.jpg") == endpoint.READINGS
    assert api.images.count("004.jpg") == endpoint.READINGS
    assert sorted(read_answers(tmp_path)) == [name for name in NAMES if name != "004.jpg"]
    assert read_failures(tmp_path)["004.jpg"].startswith(reason)


@pytest.mark.parametrize(
    ("status", "requests", "message"),
    [
        (401, 1, "refuses the key .*401: told so.* environment variable CHATREID_TEST_KEY"),
        (403, 1, "refuses the key .*403: told so"),
        (404, 1, "does not know the model 'gpt-4o'.*404: told so.* Check both"),
        (400, 2, "does not take our request .*400: told so.* Check model"),
    ],
)
def test_wrong_settings_stop_at_once(
    api: Any, make: MakeRecipe, tmp_path: Path, status: int, requests: int, message: str
) -> None:
    api.misbehave("probe", 99, status=status, body={"error": {"message": "told so"}})
    with pytest.raises(UpstreamError, match=message):
        caption_images(make())
    assert api.asked == ["probe"] * requests
    assert not (tmp_path / "manifests" / "own.captions.jsonl").exists()


def test_key_that_ends_half_way_stops_and_keeps_the_answers(api: Any, make: MakeRecipe, tmp_path: Path) -> None:
    api.misbehave("003.jpg", 99, status=401)
    with pytest.raises(UpstreamError, match="refuses the key"):
        caption_images(make(concurrency=1))
    assert sorted(read_answers(tmp_path)) == NAMES[:3]
    assert api.images == NAMES[:4]


def test_empty_account_stops_though_its_status_is_429(api: Any, make: MakeRecipe) -> None:
    body = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    api.misbehave("probe", 99, status=429, body=body)
    with pytest.raises(UpstreamError, match="no credit left"):
        caption_images(make())
    assert api.asked == ["probe"]


def test_image_that_the_endpoint_rejects_is_a_failure_and_not_asked_again(
    api: Any, make: MakeRecipe, tmp_path: Path
) -> None:
    api.misbehave("003.jpg", 99, status=400, body={"error": {"message": "content policy"}})
    caption_images(make(max_failures=0.2))
    assert api.images.count("003.jpg") == 1
    assert read_failures(tmp_path) == {"003.jpg": "400: content policy"}


def test_endpoint_out_of_reach_is_one_error(make: MakeRecipe, api: Any) -> None:
    with pytest.raises(UpstreamError, match="127.0.0.1:9 does not answer: the connection failed"):
        caption_images(make(base_url="http://127.0.0.1:9/v1", retries=1))


def test_too_many_failures_stop_with_the_last_reasons(api: Any, make: MakeRecipe, tmp_path: Path) -> None:
    good = api.reply
    refused = api.make_reply(api.make_completion(None, "No people, please."))
    api.reply = lambda name, before: good(name, before) if name in ("probe", "000.jpg") else refused
    with pytest.raises(DataError, match=r"3 of 12 images .*max_failures \(0\.2\)(.|\n)*003\.jpg: refusal: No people"):
        caption_images(make(images=12, concurrency=1, max_failures=0.2))
    assert set(api.images) == set(NAMES[:4])
    assert sorted(read_answers(tmp_path)) == ["000.jpg"]
    assert sorted(read_failures(tmp_path)) == NAMES[1:4]


def test_next_run_asks_only_about_what_has_no_answer(api: Any, make: MakeRecipe, tmp_path: Path) -> None:
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
    assert sorted(read_answers(tmp_path)) == NAMES
    assert path.read_bytes().startswith(complete_lines)
    assert read_failures(tmp_path) == {}
    assert report.values["sources"][0]["answered_before"] == 3
    requests = len(api.asked)
    assert caption_images(settings).values["sources"][0]["answered_before"] == 6
    assert len(api.asked) == requests


def test_damaged_answers_file_is_named_with_the_line(make: MakeRecipe, tmp_path: Path) -> None:
    settings = make()
    (tmp_path / "manifests" / "own.captions.jsonl").write_bytes(b'{"path": "000.jpg"}\n\0\0\0\n')
    with pytest.raises(DataError, match=r"own\.captions\.jsonl, line 2"):
        caption_images(settings)


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
    api: Any, make: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
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
    assert len(read_failures(tmp_path)) == 4
    api.misbehave("probe", 99, **echo(401))
    with pytest.raises(UpstreamError) as caught:
        caption_images(settings)
    print(caught.value)
    shown = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "[key]" in shown.out and "all requests wait" in shown.err
    assert KEY[:8] not in shown.out + shown.err and KEY[:8].encode() not in written
    assert read_answers(tmp_path)["005.jpg"]["captions"] == ["A man with [key]."]
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in api.headers)


@pytest.mark.parametrize("refused", [True, False], ids=["status 400", "silently ignored"])
def test_endpoint_without_json_schema_is_asked_in_words(
    api: Any, make: MakeRecipe, tmp_path: Path, refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(name: str, before: int) -> Any:
        if "response_format" in api.bodies[-1]:
            return api.make_reply(api.make_completion("I see a grey area."), status=400 if refused else 200)
        text = f"<think>a {{brace}}</think>\n```json\n{api.make_description()}\n```"
        return api.make_reply(api.make_completion(text))

    api.reply = reply
    caption_images(make(concurrency=1))
    assert sorted(read_answers(tmp_path)) == NAMES
    assert api.asked.count("probe") == 1 + refused
    assert "response_format" not in api.bodies[-1]
    assert '"upper_colour": {"type": "string"' in api.bodies[-1]["messages"][0]["content"][-1]["text"]
    assert "does not keep to a JSON schema" in capsys.readouterr().err


def test_images_with_unrecognised_clothing_are_marked_as_occluded(api: Any, make: MakeRecipe, tmp_path: Path) -> None:
    text = json.dumps({"descriptions": [], "attributes": {}, "clothing_recognised": False})
    api.misbehave("005.jpg", 1, body=api.make_completion(text))
    report = caption_images(make())
    expected = {"path": "005.jpg", "captions": [], "attributes": {}, "clothing_recognised": False, "model": "gpt-4o"}
    assert read_answers(tmp_path)["005.jpg"] == expected
    assert report.values["sources"][0]["occluded"] == 1
    assert "clothing_recognised" not in read_answers(tmp_path)["004.jpg"]


def test_several_captions_for_each_image(api: Any, make: MakeRecipe, tmp_path: Path) -> None:
    caption_images(make(captions_per_image=2))
    assert read_answers(tmp_path)["000.jpg"]["captions"] == ["Seen in 000.jpg.", "Again: Seen in 000.jpg."]
    assert "2 descriptions" in api.bodies[-1]["messages"][0]["content"][-1]["text"]


def test_damaged_image_is_a_failure(api: Any, make: MakeRecipe, tmp_path: Path) -> None:
    settings = make(max_failures=0.5)
    (tmp_path / "crops" / "001.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "crops" / "002.jpg").unlink()
    caption_images(settings)
    assert set(read_failures(tmp_path)) == {"001.jpg", "002.jpg"}
    assert "cannot be read as an image" in read_failures(tmp_path)["001.jpg"]


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

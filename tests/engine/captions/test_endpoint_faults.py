"""Tests of chatreid_plugin.engine.captions against a real local server that misbehaves on purpose."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.captions.endpoint import caption_images
from chatreid_plugin.engine.captions.jobs import CaptionRun
from chatreid_plugin.errors import DataError, UpstreamError
from chatreid_plugin.openai_client import READINGS


NAMES = [f"{number:03d}.jpg" for number in range(6)]
MakeRecipe = Callable[..., BuildSettings]
ReadAnswers = Callable[[], dict[str, Any]]
ReadFailures = Callable[[], dict[str, str]]


def test_429_pauses_all_workers_for_the_time_asked(api: Any, make: MakeRecipe, read_answers: ReadAnswers) -> None:
    api.misbehave("000.jpg", 1, status=429, headers={"Retry-After": "1"}, body={"error": {"message": "slow down"}})
    caption_images(make(images=12, concurrency=2))
    refused = api.times[api.asked.index("000.jpg")]
    # The other worker may have a request on its way when the 429 comes.
    assert not [moment for moment in api.times if refused + 0.3 < moment < refused + 0.95]
    assert len([moment for moment in api.times if moment > refused + 0.95]) >= 8
    assert len(read_answers()) == 12


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
def test_passing_faults_are_retried(
    api: Any, make: MakeRecipe, read_answers: ReadAnswers, changes: dict[str, Any]
) -> None:
    api.misbehave("002.jpg", 2, **changes)
    report = caption_images(make(timeout=0.4))
    assert api.images.count("002.jpg") == 3
    assert len(api.images) == 8
    assert sorted(read_answers()) == NAMES
    assert report.values["sources"][0]["failed"] == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": 500, "body": {"error": {"message": "out of memory"}}}, "500: out of memory"),
        ({"delay": 0.9}, "no answer within 0.6 s"),
        ({"body": b"{", "cut": True}, "the connection failed"),
    ],
)
def test_lasting_faults_are_failures_after_all_retries(
    api: Any,
    make: MakeRecipe,
    read_answers: ReadAnswers,
    read_failures: ReadFailures,
    changes: dict[str, Any],
    reason: str,
) -> None:
    api.misbehave("002.jpg", 99, **changes)
    caption_images(make(timeout=0.6, retries=2, max_failures=0.2))
    assert api.images.count("002.jpg") == 3
    assert sorted(read_answers()) == [name for name in NAMES if name != "002.jpg"]
    assert list(read_failures()) == ["002.jpg"]
    assert reason in read_failures()["002.jpg"]


def list_unreadable(api: Any) -> dict[str, dict[str, Any]]:
    """Return answers that hold no description."""
    answer = json.loads(api.make_description())
    return {
        "broken JSON: Sure! {": {"body": api.make_completion("Sure! {")},
        "broken JSON": {"body": b'{"choices": [{'},
        "refusal: I cannot help": {"body": api.make_completion(None, "I cannot help with that.")},
        "broken JSON: Expecting value": {"body": b"<html>", "headers": {"Content-Type": "text/html"}},
        "no chat completion": {"body": {"choices": []}},
        "wrong schema: attributes": {"body": api.make_completion(json.dumps(answer | {"attributes": None}))},
        "wrong schema: 0 descriptions": {"body": api.make_completion(json.dumps(answer | {"descriptions": [" "]}))},
        "wrong schema: clothing_recognised": {"body": api.make_completion('{"clothing_recognised": "yes"}')},
        "wrong schema: attribute upper_colour has the value 'plaid'": {
            "body": api.make_completion(
                json.dumps(answer | {"attributes": answer["attributes"] | {"upper_colour": "plaid"}})
            )
        },
        "a text holds half a character": {
            "body": api.make_completion(json.dumps(answer | {"descriptions": ["\ud800"]}))
        },
        "broken JSON: {": {"body": api.make_completion('{"clothing_recognised": ' + "9" * 5000 + "}")},
        "broken JSON: a number of 5000 digits": {"body": b'{"choices": ' + b"9" * 5000 + b"}"},
        "broken JSON: maximum recursion": {"body": b'{"choices": ' + b"[" * 100_000},
        "the answer is nested too deeply": {"body": b'{"choices": ' + b"[" * 300 + b"]" * 300 + b"}"},
    }


@pytest.mark.parametrize("number", range(14))
def test_unreadable_answers_are_asked_for_again_then_fail(
    api: Any, make: MakeRecipe, read_answers: ReadAnswers, read_failures: ReadFailures, number: int
) -> None:
    reason, changes = list(list_unreadable(api).items())[number]
    api.misbehave("001.jpg", READINGS - 1, **changes)
    api.misbehave("004.jpg", 99, **changes)
    caption_images(make(max_failures=0.2))
    assert api.images.count("001.jpg") == READINGS
    assert api.images.count("004.jpg") == READINGS
    assert sorted(read_answers()) == [name for name in NAMES if name != "004.jpg"]
    assert read_failures()["004.jpg"].startswith(reason)


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


def test_key_that_ends_half_way_stops_and_keeps_the_answers(
    api: Any, make: MakeRecipe, read_answers: ReadAnswers
) -> None:
    api.misbehave("003.jpg", 99, status=401)
    with pytest.raises(UpstreamError, match="refuses the key"):
        caption_images(make(concurrency=1))
    assert sorted(read_answers()) == NAMES[:3]
    assert api.images == NAMES[:4]


def test_empty_account_stops_though_its_status_is_429(api: Any, make: MakeRecipe) -> None:
    body = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    api.misbehave("probe", 99, status=429, body=body)
    with pytest.raises(UpstreamError, match="no credit left"):
        caption_images(make())
    assert api.asked == ["probe"]


def test_image_that_the_endpoint_rejects_is_a_failure_and_not_asked_again(
    api: Any, make: MakeRecipe, read_failures: ReadFailures
) -> None:
    api.misbehave("003.jpg", 99, status=400, body={"error": {"message": "content policy"}})
    caption_images(make(max_failures=0.2))
    assert api.images.count("003.jpg") == 1
    assert read_failures() == {"003.jpg": "400: content policy"}


def test_endpoint_out_of_reach_is_one_error(make: MakeRecipe, api: Any) -> None:
    with pytest.raises(UpstreamError, match="127.0.0.1:9 does not answer: the connection failed"):
        caption_images(make(base_url="http://127.0.0.1:9/v1", retries=1))


def test_too_many_failures_stop_with_the_last_reasons(
    api: Any, make: MakeRecipe, read_answers: ReadAnswers, read_failures: ReadFailures
) -> None:
    good = api.reply
    refused = api.make_reply(api.make_completion(None, "No people, please."))
    api.reply = lambda name, before: good(name, before) if name in ("probe", "000.jpg") else refused
    with pytest.raises(DataError, match=r"3 of 12 images .*max_failures \(0\.2\)(.|\n)*003\.jpg: refusal: No people"):
        caption_images(make(images=12, concurrency=1, max_failures=0.2))
    assert set(api.images) == set(NAMES[:4])
    assert sorted(read_answers()) == ["000.jpg"]
    assert sorted(read_failures()) == NAMES[1:4]


def test_damaged_answers_file_is_named_with_the_line(make: MakeRecipe, tmp_path: Path) -> None:
    settings = make()
    (tmp_path / "manifests" / "own.captions.jsonl").write_bytes(b'{"path": "000.jpg"}\n\0\0\0\n')
    with pytest.raises(DataError, match=r"own\.captions\.jsonl, line 2"):
        caption_images(settings)


def test_damaged_image_is_a_failure(api: Any, make: MakeRecipe, tmp_path: Path, read_failures: ReadFailures) -> None:
    settings = make(max_failures=0.5)
    (tmp_path / "crops" / "001.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "crops" / "002.jpg").unlink()
    caption_images(settings)
    assert set(read_failures()) == {"001.jpg", "002.jpg"}
    assert "cannot be read as an image" in read_failures()["001.jpg"]


def test_answers_that_cannot_be_kept_are_no_failures_of_images(
    api: Any, make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, read_failures: ReadFailures
) -> None:
    def refuse(*_: Any) -> None:
        raise DataError("the disk is full")

    monkeypatch.setattr(CaptionRun, "keep_answer", refuse)
    with pytest.raises(DataError, match="the disk is full"):
        caption_images(make(max_failures=1))
    assert read_failures() == {}


def test_absurd_usage_does_not_stop_the_run(api: Any, make: MakeRecipe, read_answers: ReadAnswers) -> None:
    usage = {"prompt_tokens": -(10**15), "completion_tokens": 10**19}
    api.misbehave("001.jpg", 1, body=api.make_completion(api.make_description()) | {"usage": usage})
    prices = {"price_per_million_input_tokens": 1.0, "price_per_million_output_tokens": 1.0}
    caption_images(make(tokens_per_minute=10**9, **prices))
    assert sorted(read_answers()) == NAMES


def test_redirect_ends_the_run_before_a_crop_leaves(api: Any, make: MakeRecipe, serve_answers: Any) -> None:
    taken: list[Any] = []
    elsewhere = serve_answers(lambda path, headers, body: taken.append(body) or (200, {}))
    api.misbehave("probe", 99, status=307, headers={"Location": f"{elsewhere}/chat/completions"})
    with pytest.raises(UpstreamError, match=f"sends requests on to {elsewhere}.*meant for base_url"):
        caption_images(make())
    assert taken == []

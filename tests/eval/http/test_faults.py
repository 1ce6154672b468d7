"""``backend: http`` against a real local server that misbehaves on purpose, and settings that cannot work."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.datasets.benchmark import make_image_query
from chatreid_plugin.errors import ConfigError, UpstreamError
from chatreid_plugin.eval.backends.http import HttpScorer
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.openai_client import READINGS
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import read_json


PAIR = "image_to_image_one_to_one"


def hang(body: dict[str, Any]) -> Any:
    time.sleep(0.8)
    return 400, {}  # a client that still waits stops


FAULTS: dict[str, Any] = {
    "429": (429, {}, {"Retry-After": "0"}),
    "500": (500, {"error": {"message": "out of memory"}}),
    "bad gateway": (502, b"<html>", {"Content-Type": "text/html"}),
    "hang": hang,
    "cut connection": (200, b'{"choices": [', {}, True),
    "truncated JSON": (200, b'{"choices": [{"index": 0'),
    "missing logprobs": {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes"}}]},
    "no choices": {"choices": []},
}


@pytest.mark.parametrize("name", FAULTS)
def test_passing_faults_are_asked_again(
    server: Any, make: Callable[..., HttpScorer], records: list[ImageRecord], name: str
) -> None:
    seen = server.misbehave(120, 2, FAULTS[name])
    scores = make(timeout=0.4).score_pairs(make_image_query(records[0]), records, PAIR)
    np.testing.assert_allclose(scores, [grey / 100 - 2 for grey in server.greys], atol=1e-6)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("name", "reason", "times"),
    [
        ("429", "429", 2),
        ("500", "500: out of memory", 2),
        ("hang", "no answer within 0.3 s", 2),
        ("cut connection", "the connection failed", 2),
        ("truncated JSON", "broken JSON", READINGS),
        ("missing logprobs", "no log-probabilities", READINGS),
        ("no choices", "no chat completion", READINGS),
    ],
)
def test_lasting_faults_are_one_error_that_names_server_query_and_candidate(
    server: Any,
    make: Callable[..., HttpScorer],
    records: list[ImageRecord],
    name: str,
    reason: str,
    times: int,
) -> None:
    seen = server.misbehave(120, 99, FAULTS[name])
    scorer = make(timeout=0.3, retries=1)
    host = server.base_url.removeprefix("http://").removesuffix("/v1")
    with pytest.raises(UpstreamError, match=rf"{host} failed at query 40\.png, candidate 120\.png: .*{reason}"):
        scorer.score_pairs(make_image_query(records[0]), records, PAIR)
    assert len(seen) == times


@pytest.mark.parametrize("name", FAULTS)
def test_passing_faults_of_the_probe_change_nothing(server: Any, make: Callable[..., HttpScorer], name: str) -> None:
    traits = make().traits
    seen = server.misbehave(None, 2, FAULTS[name])
    assert make(timeout=0.4).traits == traits
    assert len(seen) == 3


def test_passing_faults_of_the_probe_leave_several_votes_at_once(server: Any, make: Callable[..., HttpScorer]) -> None:
    server.reply = lambda body: server.make_completion(texts=("Spring",) * body.get("n", 1))
    wrong = [FAULTS["truncated JSON"], FAULTS["no choices"]]
    usual = server.reply
    server.reply = lambda body: wrong.pop() if wrong and "n" in body else usual(body)
    traits = make(votes=3).traits
    assert not wrong
    assert (traits.gives, traits.several_choices) == ("answers", True)


def test_passing_fault_of_the_list_of_models_keeps_a_server_of_ours(
    server: Any, make: Callable[..., HttpScorer]
) -> None:
    listed = {"data": [{"id": "any", "chatreid": {"weights": "1"}}]}
    lists = [listed, {}, b'{"data": [']
    server.models = lists.pop
    assert make().traits.own == {"weights": "1"}
    assert not lists


def test_system_prompt_that_a_server_of_ours_does_not_have_is_refused(
    server: Any, make: Callable[..., HttpScorer]
) -> None:
    server.models = lambda: {"data": [{"id": "any", "chatreid": {"weights": "1", "system_prompt": "Compare."}}]}
    assert make().fingerprint["system_prompt"] == make(system_prompt="Compare.").fingerprint["system_prompt"]
    with pytest.raises(ConfigError, match=r"system_prompt: 'Mine.' is not that of .*'Compare.'.*model.system_prompt="):
        make(system_prompt="Mine.")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("429", "does not answer: 429"),
        ("500", "does not answer: 500: out of memory"),
        ("hang", "does not answer: no answer within 0.3 s"),
        ("truncated JSON", "no answer that can be read: broken JSON"),
        ("no choices", "no answer that can be read: no chat completion"),
    ],
)
def test_lasting_faults_of_the_probe_are_no_hard_answers(
    server: Any, make: Callable[..., HttpScorer], name: str, reason: str
) -> None:
    seen = server.misbehave(None, 99, FAULTS[name])
    with pytest.raises(UpstreamError, match=reason):
        make(timeout=0.3, retries=READINGS - 1)
    assert len(seen) == READINGS


def test_rejected_image_stops_at_once(
    server: Any, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    seen = server.misbehave(120, 99, (400, {"error": {"message": "image too small"}}))
    with pytest.raises(UpstreamError, match=r"candidate 120\.png: 400: image too small"):
        make().score_pairs(make_image_query(records[0]), records, PAIR)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses the key.*CHATREID_TEST_KEY"), (404, "does not know the model 'any'"), (400, "does not take our")],
)
def test_wrong_settings_stop_before_anything_is_scored(
    server: Any, make: Callable[..., HttpScorer], status: int, message: str
) -> None:
    server.reply = lambda body: (status, {"error": {"message": f"told so {server.key}"}})
    with pytest.raises(UpstreamError, match=message) as caught:
        make()
    assert server.key not in str(caught.value)


def test_server_out_of_reach_is_one_error(make: Callable[..., HttpScorer]) -> None:
    with pytest.raises(UpstreamError, match="127.0.0.1:9 does not answer: the connection failed"):
        make(base_url="http://127.0.0.1:9/v1", retries=1)


def test_missing_key_for_another_machine_is_refused(make: Callable[..., HttpScorer]) -> None:
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        make(base_url="https://scores.invalid/v1", api_key_variable="NO_SUCH_VARIABLE")


def test_wrong_key_is_named_where_the_models_are_asked_for(server: Any, make: Callable[..., HttpScorer]) -> None:
    server.models = lambda: (401, {"error": {"message": "no such key"}})
    with pytest.raises(ConfigError, match="does not tell its models .*refuses the key.*CHATREID_TEST_KEY"):
        make()


@pytest.mark.parametrize("models", [{"data": [{"id": "one"}, {"id": "two"}]}, None, {"data": []}])
def test_model_has_to_be_named_unless_the_server_has_one(
    server: Any, make: Callable[..., HttpScorer], models: Any
) -> None:
    server.models = models
    with pytest.raises(ConfigError, match="Set `model`"):
        make()
    assert make(model="two").traits.model == "two"


def test_finished_queries_are_kept_when_the_server_fails(
    server: Any, make_world: Callable[..., Path], make_settings: Callable[..., EvalSettings], tmp_path: Path
) -> None:
    broken = [True]

    def reply(body: dict[str, Any]) -> Any:
        if broken[0] and len(server.pairs) > 20:
            return 500, {}
        return server.make_completion({"Yes": -sum(server.read_greys(body)) / 100, "No": -1.0})

    server.reply = reply
    settings = make_settings(
        make_world(), backend="http", base_url=server.base_url, retries=0, concurrency=1, model="any"
    )
    with pytest.raises(UpstreamError, match="Finished queries are kept"):
        run_evaluation(settings)
    store = next((tmp_path / "out").glob("scores-*.jsonl"))
    assert len(store.read_text().splitlines()) == 2  # the header and the first query of eleven candidates
    broken[0] = False
    asked = len(server.pairs)
    run_evaluation(settings)
    assert len(server.pairs) - asked == 33
    assert read_json(tmp_path / "out" / "results.json")["protocol"]["pairs_scored"] == 44


def test_images_go_to_another_machine_only_after_saying_so(
    make: Callable[..., HttpScorer],
    records: list[ImageRecord],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scorer = make()
    scorer.prepare([make_image_query(records[0])], records[1:])
    assert "Sending" not in caplog.text
    monkeypatch.setattr("chatreid_plugin.eval.backends.http.is_local", lambda url: False)
    scorer.prepare([make_image_query(records[0])], records[1:])
    assert "Sending 5 images of people to 127.0.0.1" in caplog.text and "(model any)" in caplog.text

"""``backend: http`` against a real local server that misbehaves on purpose."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.errors import ConfigError, UpstreamError
from chatreid_plugin.eval.backends.http import READINGS, HttpScorer
from chatreid_plugin.eval.backends.http_replies import compute_margin, count_votes, read_logprobs
from chatreid_plugin.eval.modes import score_query
from chatreid_plugin.eval.pipeline import run_evaluation
from chatreid_plugin.eval.queries import Query, make_image_query
from chatreid_plugin.eval.report import render_table
from chatreid_plugin.eval_settings import EvalSettings
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.servers.client import BrokenAnswer
from chatreid_plugin.shards import read_json


PAIR, CHOICE = "image_to_image_one_to_one", "standard_reid"
KEY = "sk-test-0123456789"
CUT = "cut"
# Grey values of the crops, which say how much the server likes them.
GREYS = (40, 80, 120, 160, 200)


def make_completion(best: dict[str, float] | None = None, texts: tuple[str, ...] = ("Yes",)) -> dict[str, Any]:
    """Return the body of a chat completion with one token's alternatives."""
    choices: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        choice: dict[str, Any] = {"index": index, "message": {"role": "assistant", "content": text}}
        if best is not None:
            entries = [{"token": token, "logprob": value, "bytes": None} for token, value in best.items()]
            choice["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
        choices.append(choice)
    return {"object": "chat.completion", "choices": choices}


def read_greys(body: dict[str, Any]) -> list[int]:
    """Return the grey value of every image of a request."""
    parts = body["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    return [int(np.asarray(picture)[0, 0, 0]) for picture in pictures]


def is_probe(body: dict[str, Any]) -> bool:
    return "winter" in json.dumps(body["messages"])


@dataclass
class FakeServer:
    """A chat completions server; ``reply`` is given the body and returns (status, body, headers), or None to hang."""

    reply: Callable[[dict[str, Any]], Any]
    models: Any = field(default_factory=lambda: {"data": [{"id": "any"}]})
    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    keys: list[str] = field(default_factory=list[str])
    base_url: str = ""
    active: int = 0
    most_active: int = 0
    lock: Any = field(default_factory=threading.Lock)

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """Bodies of questions about images, probes left out."""
        return [body for body in self.bodies if not is_probe(body)]


def answer_well(body: dict[str, Any]) -> Any:
    """Like a server with ten log-probabilities: Yes is the likelier the lighter the last image."""
    if not body.get("logprobs"):
        return make_completion()
    likes = read_greys(body)[-1] / 100
    return make_completion({"Yes": likes - 3, "No": -1.0, "Spring": -4.0})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr("chatreid_plugin.servers.client.FIRST_WAIT", 0.01)
    monkeypatch.setenv("CHATREID_TEST_KEY", KEY)
    fake = FakeServer(answer_well)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(200 if fake.models is not None else 404, fake.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.bodies.append(body)
                fake.keys.append(self.headers["Authorization"])
                fake.active += 1
                fake.most_active = max(fake.most_active, fake.active)
            reply = fake.reply(body)
            with fake.lock:
                fake.active -= 1
            if isinstance(reply, tuple):
                self.send(*reply)
            else:
                self.send(200, reply)

        def send(self, status: int, body: Any, headers: dict[str, str] | None = None, cut: str = "") -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) + 100 * bool(cut)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                pass  # the client has given up, as it should

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    fake.base_url = f"http://127.0.0.1:{running.server_address[1]}/v1"
    yield fake
    running.shutdown()
    running.server_close()


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    found: list[ImageRecord] = []
    for grey in GREYS:
        Image.new("RGB", (32, 64), (grey, grey, grey)).save(tmp_path / f"{grey}.png")
        found.append(ImageRecord(f"t/{grey}", "t", "gallery", f"{grey}.png", f"t:{grey}", "1", 32, 64))
    return found


@pytest.fixture
def make(server: FakeServer, tmp_path: Path) -> Callable[..., HttpScorer]:
    """Return a function that makes a scorer which asks that server."""

    def make(**changes: Any) -> HttpScorer:
        values = {"protocol": "folder", "manifest": "m.parquet", "output_dir": "out", "backend": "http"}
        values |= {"base_url": server.base_url, "api_key_variable": "CHATREID_TEST_KEY", "concurrency": 3}
        return HttpScorer(EvalSettings.model_validate(values | changes), tmp_path)

    return make


def misbehave(server: FakeServer, grey: int, times: int, wrong: Any) -> list[int]:
    """Give a wrong reply to the first requests about a candidate; return a list that counts them."""
    usual, seen = server.reply, list[int]()

    def reply(body: dict[str, Any]) -> Any:
        if not is_probe(body) and read_greys(body)[-1] == grey:
            seen.append(grey)
            if len(seen) <= times:
                return wrong(body) if callable(wrong) else wrong
        return usual(body)

    server.reply = reply
    return seen


def test_scores_are_margins_in_the_order_of_the_candidates(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    scorer = make()
    scores = scorer.score_pairs(make_image_query(records[0]), records[::-1], PAIR)
    np.testing.assert_allclose(scores, [grey / 100 - 2 for grey in GREYS[::-1]], atol=1e-6)
    assert [read_greys(body)[0] for body in server.pairs] == [40] * 5  # the query comes first in every request
    assert server.most_active <= 3
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert KEY not in json.dumps(dict(scorer.fingerprint)) + str(scorer.settings)


def test_query_of_words_is_asked_about_one_image(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    make().score_pairs(Query("q", "p", text="a red coat"), records[:1], "text_to_image_one_to_one")
    parts = server.pairs[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text"]
    assert "a red coat" in parts[2]["text"]


def test_images_are_prepared_by_the_image_policy(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    make(chatreid_stage=1).score_pairs(make_image_query(records[0]), records[1:2], PAIR)
    parts = server.pairs[0]["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in urls]
    assert sizes == [(128, 256)] * 2


@pytest.mark.parametrize(
    ("best", "confidence"),
    [({"Yes": -0.1, "No": -3.0}, "margins"), ({"Spring": -0.1, "No": -3.0}, "top_logprobs")],
)
def test_probe_finds_out_whether_both_words_always_come(
    server: FakeServer, make: Callable[..., HttpScorer], best: dict[str, float], confidence: str
) -> None:
    server.reply = lambda body: make_completion(best)
    assert make().confidence == confidence


def test_fewer_log_probabilities_are_asked_for_when_twenty_are_refused(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    server.reply = lambda body: (400, {}) if body.get("top_logprobs", 0) > 5 else answer_well(body)
    scorer = make()
    scorer.score_pairs(make_image_query(records[0]), records[:1], PAIR)
    assert server.pairs[0]["top_logprobs"] == 5


def test_missing_word_counts_as_the_least_likely_one_returned(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord], caplog: pytest.LogCaptureFixture
) -> None:
    server.reply = lambda body: make_completion({"Yes": -0.5, "yes": -2.0, "The": -5.0})
    scorer = make()
    assert scorer.score_pairs(make_image_query(records[0]), records[:2], PAIR).tolist() == [4.5, 4.5]
    assert scorer.filled == 2 and scorer.confidence == "top_logprobs"
    assert caplog.text.count("does not always return the words") == 1


def test_margin_ends_the_claim_of_margins_once_a_word_was_missing(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    misbehave(server, 80, 1, make_completion({"Yes": -0.5, "The": -5.0}))
    scorer = make()
    assert scorer.confidence == "margins"
    scorer.score_pairs(make_image_query(records[0]), records, PAIR)
    assert scorer.confidence == "top_logprobs"


def test_tokens_are_read_however_servers_write_them() -> None:
    best = read_logprobs(make_completion({"\u2581Yes": -0.5, " No": -2.0, "No": -3.0}))
    assert compute_margin(best).number == 1.5
    assert compute_margin({"Yes": -0.1, "No": -9999.0}).number == pytest.approx(9998.9)
    assert compute_margin({"A": -1.0, "B": -2.0}).number == 0
    with pytest.raises(BrokenAnswer):
        compute_margin({})
    with pytest.raises(BrokenAnswer, match="no number"):
        read_logprobs(make_completion({"Yes": float("nan")}))


def test_letters_are_scored_by_their_log_probabilities(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    server.reply = lambda body: make_completion({"B": -0.5, "A": -1.5, "Yes": -2.0, "No": -4.0})
    scorer = make(extra_body={"allowed_token_ids": [1, 2], "logprob_token_ids": [1, 2], "seed": 3})
    scores = scorer.choose(make_image_query(records[0]), [records[:3]], CHOICE)[0]
    assert scores.tolist() == [-1.5, -0.5, -4.0]
    assert scorer.filled == 1
    assert server.pairs[0]["seed"] == 3
    keys = {"allowed_token_ids", "logprob_token_ids"}
    assert keys <= set(server.bodies[0]) and not keys & set(server.pairs[0])


@pytest.mark.parametrize("mode", ["choice", "turns"])
def test_windows_of_a_choice_are_asked_at_once(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord], mode: str
) -> None:
    def reply(body: dict[str, Any]) -> Any:
        time.sleep(0.02)
        best = dict(zip("ABCDE", [-grey / 50 for grey in read_greys(body)[1:]], strict=False))
        return make_completion({**best, "Yes": -9.0})

    server.reply = reply
    candidates = [record for record in records for _ in range(4)]
    scores: list[Any] = []
    for concurrency in (3, 1):
        server.most_active = 0
        scorer = make(concurrency=concurrency, mode=mode, window=4)
        scores.append(score_query(scorer.settings, scorer, make_image_query(records[0]), candidates))
        assert server.most_active == concurrency
    assert scores[0].tolist() == scores[1].tolist()
    assert np.argmax(scores[0]) < 4  # the darkest


def answer_in_words(body: dict[str, Any]) -> Any:
    """Like LLaMA-Factory's API: no log-probabilities, ``n`` is known."""
    if is_probe(body):
        return make_completion(texts=("Spring",) * body.get("n", 1))
    texts = {40: ("No", "No", "No"), 80: ("Yes", "No", "No."), 120: ("Yes.", "yes", "Who?"), 160: ("A, C", "A", "b")}
    return make_completion(texts=texts[read_greys(body)[-1]][: body.get("n", 1)])


def test_server_without_log_probabilities_gives_hard_answers(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord], caplog: pytest.LogCaptureFixture
) -> None:
    server.reply = answer_in_words
    scorer = make()
    assert scorer.confidence == "answers"
    assert scorer.score_pairs(make_image_query(records[0]), records[:3], PAIR).tolist() == [0, 1, 1]
    assert "hard answers" in caplog.text
    assert server.pairs[0]["temperature"] == 0 and "n" not in server.pairs[0]
    assert scorer.choose(make_image_query(records[0]), [records[1:4]], CHOICE)[0].tolist() == [1, 0, 1]


def test_votes_are_sampled_in_one_request_where_the_server_can(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    server.reply = answer_in_words
    scorer = make(votes=3)
    scores = scorer.score_pairs(make_image_query(records[0]), records[:3], PAIR)
    np.testing.assert_allclose(scores, [0, 1 / 3, 2.5 / 3], atol=1e-6)
    assert scorer.filled == 1
    assert len(server.pairs) == 3
    assert (server.pairs[0]["n"], server.pairs[0]["temperature"]) == (3, 1.0)
    assert scorer.fingerprint["votes"] == 3


def test_votes_are_asked_for_one_by_one_where_it_cannot(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    server.reply = lambda body: make_completion(texts=("Yes",))
    assert make(votes=3).score_pairs(make_image_query(records[0]), records[:2], PAIR).tolist() == [1, 1]
    assert len(server.pairs) == 6 and all("n" not in body for body in server.pairs)


def test_unreadable_answer_is_half_a_vote() -> None:
    assert count_votes(PAIR, ["Yes", "perhaps"]).number == 0.75


def hang(body: dict[str, Any]) -> Any:
    time.sleep(0.8)
    return make_completion({"Yes": 0.0})


FAULTS: dict[str, Any] = {
    "429": (429, {}, {"Retry-After": "0"}),
    "500": (500, {"error": {"message": "out of memory"}}),
    "bad gateway": (502, b"<html>", {"Content-Type": "text/html"}),
    "hang": hang,
    "cut connection": (200, b'{"choices": [', {}, CUT),
    "truncated JSON": (200, b'{"choices": [{"index": 0'),
    "missing logprobs": make_completion(),
    "no choices": {"choices": []},
}


@pytest.mark.parametrize("name", FAULTS)
def test_passing_faults_are_asked_again(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord], name: str
) -> None:
    seen = misbehave(server, 120, 2, FAULTS[name])
    scores = make(timeout=0.4).score_pairs(make_image_query(records[0]), records, PAIR)
    np.testing.assert_allclose(scores, [grey / 100 - 2 for grey in GREYS], atol=1e-6)
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
    server: FakeServer,
    make: Callable[..., HttpScorer],
    records: list[ImageRecord],
    name: str,
    reason: str,
    times: int,
) -> None:
    seen = misbehave(server, 120, 99, FAULTS[name])
    scorer = make(timeout=0.3, retries=1)
    host = server.base_url.removeprefix("http://").removesuffix("/v1")
    with pytest.raises(UpstreamError, match=rf"{host} failed at query 40\.png, candidate 120\.png: .*{reason}"):
        scorer.score_pairs(make_image_query(records[0]), records, PAIR)
    assert len(seen) == times


def test_rejected_image_stops_at_once(
    server: FakeServer, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    seen = misbehave(server, 120, 99, (400, {"error": {"message": "image too small"}}))
    with pytest.raises(UpstreamError, match=r"candidate 120\.png: 400: image too small"):
        make().score_pairs(make_image_query(records[0]), records, PAIR)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses the key.*CHATREID_TEST_KEY"), (404, "does not know the model 'any'"), (400, "does not take our")],
)
def test_wrong_settings_stop_before_anything_is_scored(
    server: FakeServer, make: Callable[..., HttpScorer], status: int, message: str
) -> None:
    server.reply = lambda body: (status, {"error": {"message": f"told so {KEY}"}})
    with pytest.raises(UpstreamError, match=message) as caught:
        make()
    assert KEY not in str(caught.value)


def test_server_out_of_reach_is_one_error(make: Callable[..., HttpScorer]) -> None:
    with pytest.raises(UpstreamError, match="127.0.0.1:9 does not answer: the connection failed"):
        make(base_url="http://127.0.0.1:9/v1", retries=1)


def test_missing_key_for_another_machine_is_refused(make: Callable[..., HttpScorer]) -> None:
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        make(base_url="https://scores.invalid/v1", api_key_variable="NO_SUCH_VARIABLE")


@pytest.mark.parametrize("models", [{"data": [{"id": "one"}, {"id": "two"}]}, None, {"data": []}])
def test_model_has_to_be_named_unless_the_server_has_one(
    server: FakeServer, make: Callable[..., HttpScorer], models: Any
) -> None:
    server.models = models
    with pytest.raises(ConfigError, match="Set `model`"):
        make()
    assert make(model="two").traits.model == "two"


def test_finished_queries_are_kept_when_the_server_fails(
    server: FakeServer, make_world: Callable[..., Path], make_settings: Callable[..., EvalSettings], tmp_path: Path
) -> None:
    broken = [True]

    def reply(body: dict[str, Any]) -> Any:
        failing = broken[0] and len(server.pairs) > 20
        return (500, {}) if failing else make_completion({"Yes": -sum(read_greys(body)) / 100, "No": -1.0})

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


@pytest.mark.parametrize("confidence", ["margins", "answers"])
def test_report_flags_hard_answers_everywhere(
    server: FakeServer,
    make_world: Callable[..., Path],
    make_settings: Callable[..., EvalSettings],
    tmp_path: Path,
    confidence: str,
) -> None:
    server.reply = answer_well if confidence == "margins" else lambda body: make_completion()
    where = {"base_url": server.base_url, "api_key_variable": "CHATREID_TEST_KEY"}
    results = run_evaluation(make_settings(make_world(), backend="http", **where))
    scores = read_json(tmp_path / "out" / "results.json")["scores"]
    assert scores["confidence"] == confidence
    assert scores["scorer"] == "any (http)"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "scored by any (http)" in page and "scored by any (http)" in render_table(results)
    flags = ["hard answers" in text for text in (str(scores["warning"]), page, render_table(results))]
    assert flags == [confidence == "answers"] * 3
    for path in (tmp_path / "out").iterdir():
        assert KEY.encode() not in path.read_bytes(), path


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

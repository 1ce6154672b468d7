"""``backend: http`` against a real local server: what is asked, and how its answers become scores."""

import base64
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.datasets.benchmark import Query, make_image_query
from chatreid_plugin.errors import UpstreamError
from chatreid_plugin.eval.backends.http import HttpScorer, count_votes, look_up, need_logprobs, read_logprobs
from chatreid_plugin.eval.questions import Prompt, score_query
from chatreid_plugin.eval.report import render_table
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings, ScoringSettings
from chatreid_plugin.openai_answers import BrokenAnswer
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import read_json


PAIR, CHOICE = "image_to_image_one_to_one", "standard_reid"


def test_scores_are_margins_in_the_order_of_the_candidates(
    server: Any, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    scorer = make()
    scores = scorer.score_pairs(make_image_query(records[0]), records[::-1], PAIR)
    np.testing.assert_allclose(scores, [grey / 100 - 2 for grey in server.greys[::-1]], atol=1e-6)
    assert [server.read_greys(body)[0] for body in server.pairs] == [40] * 5  # the query comes first in every request
    assert server.most_active <= 3
    assert set(server.keys) == {f"Bearer {server.key}"}
    assert server.key not in json.dumps(dict(scorer.fingerprint)) + str(vars(scorer))


def test_query_of_words_is_asked_about_one_image(
    server: Any, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    make().score_pairs(Query("q", "p", text="a red coat"), records[:1], "text_to_image_one_to_one")
    parts = server.pairs[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text"]
    assert "a red coat" in parts[2]["text"]


def test_system_prompt_is_the_first_message(
    server: Any, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    make(system_prompt="Compare.").score_pairs(make_image_query(records[0]), records[1:2], PAIR)
    assert server.pairs[0]["messages"][0] == {"role": "system", "content": "Compare."}


def test_answers_in_words(server: Any, make: Callable[..., HttpScorer], records: list[ImageRecord]) -> None:
    scorer = make(extra_body={"allowed_token_ids": [1], "top_k": 3})
    server.reply = lambda body: server.make_completion(texts=(" Both wear red. ",))
    said = scorer.answer(Prompt(("Compare ", " and ", ".")), records[:2], 40)
    body = server.bodies[-1]
    assert said == "Both wear red." and (body["max_tokens"], body["top_k"]) == (40, 3)
    assert "allowed_token_ids" not in body and server.read_greys(body) == [40, 80]
    server.reply = lambda body: (400, {"error": {"message": "no"}})
    with pytest.raises(UpstreamError, match="does not answer"):
        scorer.answer(Prompt(("", "?")), records[:1], 40)


def test_images_are_prepared_by_the_image_policy(
    server: Any, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    make(chatreid_stage=1).score_pairs(make_image_query(records[0]), records[1:2], PAIR)
    parts = server.pairs[0]["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in urls]
    assert sizes == [(128, 256)] * 2


def test_words_of_the_probe_do_not_matter(server: Any, make: Callable[..., HttpScorer]) -> None:
    scorers: list[HttpScorer] = []
    for best in ({"Yes": -0.1, "No": -3.0}, {"Spring": -0.1, "No": -3.0}):
        server.reply = lambda body, best=best: server.make_completion(best)
        scorers.append(make())
    assert [scorer.confidence for scorer in scorers] == ["margins", "margins"]
    assert scorers[0].fingerprint == scorers[1].fingerprint


def test_fewer_log_probabilities_are_asked_for_when_twenty_are_refused(
    server: Any, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    server.reply = lambda body: (400, {}) if body.get("top_logprobs", 0) > 5 else server.answer_well(body)
    scorer = make()
    scorer.score_pairs(make_image_query(records[0]), records[:1], PAIR)
    assert server.pairs[0]["top_logprobs"] == 5


def test_missing_word_counts_as_the_least_likely_one_returned(
    server: Any, make: Callable[..., HttpScorer], records: list[ImageRecord], caplog: pytest.LogCaptureFixture
) -> None:
    server.reply = lambda body: server.make_completion({"Yes": -0.5, "yes": -2.0, "The": -5.0})
    scorer = make()
    assert scorer.score_pairs(make_image_query(records[0]), records[:2], PAIR).tolist() == [4.5, 4.5]
    assert scorer.filled == 2
    assert caplog.text.count("does not always return the words") == 1


def test_tokens_are_read_however_servers_write_them(server: Any) -> None:
    best = read_logprobs(server.make_completion({"\u2581Yes": -0.5, " No": -2.0, "No": -3.0}))
    assert best == {"Yes": -0.5, "No": -2.0}
    assert look_up(best, ("Yes", "No")) == ([-0.5, -2.0], 0)
    assert look_up({"A": -1.0, "B": -2.0}, ("Yes", "B")) == ([-2.0, -2.0], 1)
    with pytest.raises(BrokenAnswer):
        need_logprobs({})
    with pytest.raises(BrokenAnswer, match="no number"):
        read_logprobs(server.make_completion({"Yes": float("nan")}))


def test_letters_are_scored_by_their_log_probabilities(
    server: Any, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    server.reply = lambda body: server.make_completion({"B": -0.5, "A": -1.5, "Yes": -2.0, "No": -4.0})
    scorer = make(extra_body={"allowed_token_ids": [1, 2], "logprob_token_ids": [1, 2], "seed": 3})
    scores = scorer.choose(make_image_query(records[0]), [records[:3]], CHOICE)[0]
    assert scores.tolist() == [-1.5, -0.5, -4.0]
    assert scorer.filled == 1
    assert server.pairs[0]["seed"] == 3
    keys = {"allowed_token_ids", "logprob_token_ids"}
    assert keys <= set(server.bodies[0]) and not keys & set(server.pairs[0])


@pytest.mark.parametrize("mode", ["choice", "turns"])
def test_windows_of_a_choice_are_asked_at_once(
    server: Any, make: Callable[..., HttpScorer], records: list[ImageRecord], mode: str
) -> None:
    def reply(body: dict[str, Any]) -> Any:
        time.sleep(0.02)
        best = dict(zip("ABCDE", [-grey / 50 for grey in server.read_greys(body)[1:]], strict=False))
        return server.make_completion({**best, "Yes": -9.0})

    server.reply = reply
    candidates = [record for record in records for _ in range(4)]
    scores: list[Any] = []
    for concurrency in (3, 1):
        server.most_active = 0
        scorer = make(concurrency=concurrency)
        settings = ScoringSettings(backend="http", mode=mode, window=4)
        scores.append(score_query(settings, "folder", scorer, make_image_query(records[0]), candidates))
        assert server.most_active == concurrency
    assert scores[0].tolist() == scores[1].tolist()
    assert np.argmax(scores[0]) < 4  # the darkest


@pytest.fixture
def talker(server: Any) -> Any:
    """Return the server, now like LLaMA-Factory's API: no log-probabilities, ``n`` is known."""
    texts = {40: ("No", "No", "No"), 80: ("Yes", "No", "No."), 120: ("Yes.", "yes", "Who?"), 160: ("A, C", "A", "b")}

    def answer_in_words(body: dict[str, Any]) -> Any:
        votes = body.get("n", 1)
        words = ("Spring",) * votes if server.is_probe(body) else texts[server.read_greys(body)[-1]]
        return server.make_completion(texts=words[:votes])

    server.reply = answer_in_words
    return server


def test_server_without_log_probabilities_gives_hard_answers(
    talker: Any, make: Callable[..., HttpScorer], records: list[ImageRecord], caplog: pytest.LogCaptureFixture
) -> None:
    scorer = make()
    assert scorer.confidence == "answers"
    assert scorer.score_pairs(make_image_query(records[0]), records[:3], PAIR).tolist() == [0, 1, 1]
    assert "hard answers" in caplog.text
    assert talker.pairs[0]["temperature"] == 0 and "n" not in talker.pairs[0]
    assert scorer.choose(make_image_query(records[0]), [records[1:4]], CHOICE)[0].tolist() == [1, 0, 1]


def test_votes_are_sampled_in_one_request_where_the_server_can(
    talker: Any, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    scorer = make(votes=3)
    scores = scorer.score_pairs(make_image_query(records[0]), records[:3], PAIR)
    np.testing.assert_allclose(scores, [0, 1 / 3, 2.5 / 3], atol=1e-6)
    assert scorer.filled == 1
    assert len(talker.pairs) == 3
    assert (talker.pairs[0]["n"], talker.pairs[0]["temperature"]) == (3, 1.0)
    assert scorer.fingerprint["votes"] == 3


def test_votes_are_asked_for_one_by_one_where_it_cannot(
    server: Any, make: Callable[..., HttpScorer], records: list[ImageRecord]
) -> None:
    server.reply = lambda body: server.make_completion(texts=("Yes",))
    assert make(votes=3).score_pairs(make_image_query(records[0]), records[:2], PAIR).tolist() == [1, 1]
    assert len(server.pairs) == 6 and all("n" not in body for body in server.pairs)


def test_unreadable_answer_is_half_a_vote() -> None:
    assert count_votes(PAIR, ["Yes", "perhaps"]) == ([0.75], 1)


@pytest.mark.parametrize("confidence", ["margins", "answers"])
def test_report_flags_hard_answers_everywhere(
    server: Any,
    make_world: Callable[..., Path],
    make_settings: Callable[..., EvalSettings],
    tmp_path: Path,
    confidence: str,
) -> None:
    server.reply = server.answer_well if confidence == "margins" else lambda body: server.make_completion()
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
        assert server.key.encode() not in path.read_bytes(), path

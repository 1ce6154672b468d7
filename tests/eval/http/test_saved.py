"""A server's saved scores are ranked without it, and are still called what they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.errors import ConfigError, UpstreamError
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from tests.support import alter


@pytest.fixture
def settings(server: Any, make_world: Callable[..., Path], make_settings: Callable[..., EvalSettings]) -> EvalSettings:
    changes = {"backend": "http", "base_url": server.base_url, "api_key_variable": "CHATREID_TEST_KEY"}
    return make_settings(make_world(), filter="colour", top_k=3, floor=0, fusion="k_reciprocal", **changes)


def answer_in_words(server: Any, body: dict[str, Any]) -> Any:
    return server.make_completion(texts=("Yes" if server.read_greys(body)[-1] % 2 else "No",))


def leave_words_out(server: Any, body: dict[str, Any]) -> Any:
    best = {"Yes": -1.0, "No": -2.0} if server.is_probe(body) or server.read_greys(body)[-1] % 2 else {"Spring": -1.0}
    return server.make_completion(best)


@pytest.mark.parametrize("reply", [None, answer_in_words, leave_words_out])
def test_scores_keep_their_kind_when_the_server_is_gone(server: Any, settings: EvalSettings, reply: Any) -> None:
    if reply is not None:
        server.reply = lambda body: reply(server, body)
    run_evaluation(settings)
    expected = json.loads((settings.output.output_dir / "results.json").read_text())
    kinds = {None: "margins", answer_in_words: "answers", leave_words_out: "top_logprobs"}
    assert expected["scores"]["confidence"] == kinds[reply]
    server.models = None
    server.reply = lambda body: (500, {})
    with pytest.raises((ConfigError, UpstreamError), match="saved_scores=true"):
        run_evaluation(settings)
    asked = len(server.bodies)
    saved = alter(settings, {"saved_scores": True})
    run_evaluation(saved)
    assert json.loads((settings.output.output_dir / "results.json").read_text()) == expected
    assert len(server.bodies) == asked
    for changes, message in (
        ({"base_url": "http://127.0.0.1:9/v1"}, 'base_url was "http'),
        ({"model": "other"}, 'model was "any", is "other"'),
        ({"extra_body": {"top_p": 1}}, r'extra_body was {}, is {"top_p": 1}'),
    ):
        with pytest.raises(ConfigError, match=message):
            run_evaluation(alter(saved, changes))


def test_numbers_as_names_are_found_again(server: Any, settings: EvalSettings) -> None:
    biased = alter(settings, {"extra_body": {"logit_bias": {9454: 5, 151645: 1}}})
    expected = run_evaluation(biased).ranking.mean_ap
    asked = len(server.bodies)
    assert run_evaluation(alter(biased, {"saved_scores": True})).ranking.mean_ap == expected
    assert len(server.bodies) == asked

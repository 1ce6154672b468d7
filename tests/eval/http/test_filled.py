"""What a report calls the scores of a server that leaves words out, however the run came about."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.errors import UpstreamError
from chatreid_plugin.eval.report import Results
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.shards import read_json


FIRST, LAST = [9, 60], [60, 9]  # red and green of the first and the last query, persons 1 and 4


@pytest.fixture
def make(
    server: Any, make_world: Callable[..., Path], make_settings: Callable[..., EvalSettings]
) -> Callable[..., EvalSettings]:
    """Return a function that makes settings of an evaluation of four queries by that server."""
    manifest = make_world()
    common = {"backend": "http", "base_url": server.base_url, "model": "any", "retries": 0, "concurrency": 1}
    filtering = {"filter": "colour", "top_k": 6, "floor": 0, "camera_rule": False}

    def make(**changes: Any) -> EvalSettings:
        return make_settings(manifest, **(common | filtering | changes))

    return make


@pytest.fixture
def leave_out(server: Any) -> Callable[[list[int]], None]:
    """Return a function that makes the server leave No out where the query has this colour."""

    def leave_out(colour: list[int]) -> None:
        def reply(body: dict[str, Any]) -> Any:
            if server.is_probe(body):
                return server.answer_well(body)
            query, candidate = server.read_colours(body)
            likes = -sum(abs(one - other) for one, other in zip(query, candidate, strict=True)) / 10
            missing = query[:2] == colour
            return server.make_completion({"Yes": likes, "The": -30.0} | ({} if missing else {"No": -2.0}))

        server.reply = reply

    return leave_out


def read_results(settings: EvalSettings) -> Any:
    return read_json(settings.output.output_dir / "results.json")


def start_over(settings: EvalSettings) -> Any:
    """Evaluate with nothing saved and return the results."""
    shutil.rmtree(settings.output.output_dir, ignore_errors=True)
    run_evaluation(settings)
    return read_results(settings)


def test_resumed_run_gives_the_same_results(
    server: Any, make: Callable[..., EvalSettings], leave_out: Callable[[list[int]], None]
) -> None:
    leave_out(FIRST)
    settings = make(fusion="k_reciprocal")
    whole = start_over(settings)
    assert whole["scores"]["confidence"] == "top_logprobs" and "stands in" in whole["scores"]["warning"]
    shutil.rmtree(settings.output.output_dir)
    answer, asked = server.reply, len(server.pairs)
    server.reply = lambda body: (500, {}) if len(server.pairs) - asked > 8 else answer(body)
    with pytest.raises(UpstreamError, match="Finished queries are kept"):
        run_evaluation(settings)
    server.reply = answer
    run_evaluation(settings)
    assert read_results(settings) == whole


def test_saved_scores_are_fused_as_fresh_ones(
    server: Any, make: Callable[..., EvalSettings], leave_out: Callable[[list[int]], None]
) -> None:
    leave_out(FIRST)
    fused = make(fusion="k_reciprocal", fusion_weight=0.9)
    fresh = start_over(fused)
    start_over(make())
    asked = len(server.pairs)
    run_evaluation(fused)
    assert len(server.pairs) == asked
    assert read_results(fused) == fresh


def test_scores_are_margins_where_nothing_was_left_out(
    make: Callable[..., EvalSettings], leave_out: Callable[[list[int]], None]
) -> None:
    leave_out([0, 0])
    scores = start_over(make())["scores"]
    assert (scores["confidence"], scores["warning"]) == ("margins", None)


def test_word_that_another_process_missed_counts(
    make: Callable[..., EvalSettings],
    leave_out: Callable[[list[int]], None],
    run_together: Callable[..., list[Results]],
) -> None:
    leave_out(LAST)
    settings = make(fusion="k_reciprocal")
    alone = start_over(settings)
    assert alone["scores"]["confidence"] == "top_logprobs"
    shutil.rmtree(settings.output.output_dir)
    found = run_together([partial(run_evaluation, settings)] * 2)
    assert [results.confidence for results in found] == ["top_logprobs"] * 2
    assert read_results(settings) == alone

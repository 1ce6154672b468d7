"""Tests of chatreid_plugin.eval.questions: which are asked, and what order their answers give."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.answers import render_answer
from chatreid_plugin.datasets.benchmark import Query
from chatreid_plugin.errors import ConfigError, UpstreamError
from chatreid_plugin.eval.backends.files import OracleScorer
from chatreid_plugin.eval.questions import (
    ATTRIBUTE_PAIR,
    IMAGE_PAIR,
    MULTIMODAL_PAIR,
    TEXT_PAIR,
    choose_in_turns,
    choose_in_windows,
    combine_margins,
    count_turn_questions,
    describe_cost,
    draw_windows,
    name_scores,
    pick_choice_task,
    score_query,
)
from chatreid_plugin.eval.run import describe_fingerprint, run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.records import Answer, ImageRecord, ImageReference, Instruction
from chatreid_plugin.tasks import LETTERS
from tests.support import alter


MakeSettings = Callable[..., EvalSettings]


class Preferences:
    """A scorer that likes candidates by known utilities, and letters by a bias of its own."""

    confidence = "margins"
    filled = 0

    def __init__(self, utilities: dict[str, list[float]], bias: Sequence[float] = (0.0,) * 26) -> None:
        self.utilities = utilities
        self.bias = bias
        self.fingerprint: dict[str, Any] = {}
        self.questions: list[tuple[str, list[int]]] = []

    def prepare(
        self, queries: Sequence[Query], gallery: Sequence[ImageRecord], planned: Sequence[ImageRecord] = ()
    ) -> None:
        """Nothing to prepare."""

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> Any:
        places = [int(record.image_id) for record in candidates]
        self.questions.append((task, places))
        return np.array([self.utilities[task][place] for place in places], dtype=np.float32)

    def choose(self, query: Query, windows: Sequence[Sequence[ImageRecord]], task: str) -> Any:
        return [self.score_pairs(query, w, task) + np.array(self.bias[: len(w)], np.float32) for w in windows]


def ask(settings: EvalSettings, *given: Any) -> Any:
    return score_query(settings.scoring, settings.data.benchmark, *given)


def pick_task(settings: EvalSettings, query: Query) -> str:
    return pick_choice_task(settings.scoring, settings.data.benchmark, query)


def make_image(number: int) -> ImageRecord:
    return ImageRecord(str(number), "tiny", "gallery", f"{number}.png", f"tiny:{number}", "1", 24, 48)


def rank(scores: Any) -> list[int]:
    return np.argsort(-scores, kind="stable").tolist()


IMAGE_QUERY = Query("q", "tiny:1", image=make_image(99))
BOTH_QUERY = Query("q", "tiny:1", image=make_image(99), text="a man in red")
TEXT_QUERY = Query("q", "tiny:1", text="a man in red")
ATTRIBUTE_QUERY = Query("q", "tiny:1", attributes={"hat": "none"})


@pytest.mark.parametrize(
    ("query", "task"),
    [
        (IMAGE_QUERY, IMAGE_PAIR),
        (TEXT_QUERY, TEXT_PAIR),
        (ATTRIBUTE_QUERY, ATTRIBUTE_PAIR),
        (BOTH_QUERY, MULTIMODAL_PAIR),
    ],
)
def test_pointwise_asks_what_fits_the_query(make_settings: MakeSettings, query: Query, task: str) -> None:
    scorer = Preferences({task: [0.5, 2.0, -1.0]})
    scores = ask(make_settings(Path()), scorer, query, [make_image(i) for i in range(3)])
    assert scores.tolist() == [0.5, 2.0, -1.0]
    assert scorer.questions == [(task, [0, 1, 2])]


def test_pointwise_adds_standardised_margins_when_the_text_has_a_weight(make_settings: MakeSettings) -> None:
    scorer = Preferences({IMAGE_PAIR: [1.0, 3.0], TEXT_PAIR: [500.0, 100.0]})
    candidates = [make_image(0), make_image(1)]
    scores = ask(make_settings(Path(), text_weight=0.25), scorer, BOTH_QUERY, candidates)
    assert scores.tolist() == pytest.approx([-0.75, 0.75])
    scores = ask(make_settings(Path(), text_weight=4.0), scorer, BOTH_QUERY, candidates)
    assert scores.tolist() == pytest.approx([3.0, -3.0])


def test_a_question_whose_answers_do_not_differ_adds_nothing() -> None:
    same = np.array([7.0, 7.0 + 1e-6, 7.0], dtype=np.float32)
    other = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    assert combine_margins(same, other, 1.0).tolist() == pytest.approx([-1.2247449, 0.0, 1.2247449])
    assert combine_margins(same, same, 1.0).tolist() == [0.0, 0.0, 0.0]


def test_refuses_a_query_that_shows_and_says_nothing(make_settings: MakeSettings) -> None:
    with pytest.raises(ConfigError, match="neither an image nor words"):
        ask(make_settings(Path()), OracleScorer([], []), Query("q", "tiny:1"), [make_image(0)])


def test_windows_do_not_overlap_and_depend_on_seed_and_query() -> None:
    windows = draw_windows(range(23), 5, "q", 0)
    assert sorted(place for window in windows for place in window) == list(range(23))
    assert sorted(len(window) for window in windows) == [4, 4, 5, 5, 5]
    assert windows == draw_windows(range(23), 5, "q", 0)
    assert windows != draw_windows(range(23), 5, "q", 1)
    assert windows != draw_windows(range(23), 5, "other", 0)


@pytest.mark.parametrize("mode", ["choice", "turns"])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 23])
def test_orders_candidates_across_windows_by_preference(make_settings: MakeSettings, mode: str, count: int) -> None:
    utilities = np.random.default_rng(count).normal(size=count).tolist()
    scorer = Preferences({"standard_reid": utilities})
    scores = ask(
        make_settings(Path(), mode=mode, window=5), scorer, IMAGE_QUERY, [make_image(i) for i in range(count)]
    )
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert rank(scores) == rank(np.array(utilities))
    assert all(len(places) <= 5 for _, places in scorer.questions)


@pytest.mark.parametrize("mode", ["choice", "turns"])
def test_shifts_cancel_a_preference_for_letters(make_settings: MakeSettings, mode: str) -> None:
    utilities = np.linspace(0, 1, 16).tolist()
    candidates = [make_image(i) for i in range(16)]
    ranks: list[list[int]] = []
    for shifts in (1, 6):
        scorer = Preferences({"standard_reid": utilities}, bias=[3.0, -2.0, 1.0, 0.0, 2.0, -1.0])
        settings = make_settings(Path(), mode=mode, window=6, shifts=shifts)
        ranks.append(rank(ask(settings, scorer, IMAGE_QUERY, candidates)))
    assert ranks[0] != list(range(15, -1, -1))
    assert ranks[1] == list(range(15, -1, -1))


def test_a_window_of_four_is_asked_once_for_each_winner() -> None:
    asked: list[list[int]] = []

    def choose(windows: Sequence[Sequence[int]]) -> Any:
        asked.extend(sorted(places) for places in windows)
        return [[-float(place) for place in places] for places in windows]

    assert choose_in_turns(choose, 4, 10, 1, "q", 0).tolist() == [4.0, 3.0, 2.0, 1.0]
    assert asked == [[0, 1, 2, 3], [1, 2, 3], [2, 3]]


def test_choice_scores_are_log_odds_against_the_first_candidate() -> None:
    utilities = [0.3, 1.0, -2.0, 0.0]
    scores = choose_in_windows(lambda windows: [[utilities[p] for p in w] for w in windows], 4, 3, 1, "q", 0)
    assert scores.tolist() == pytest.approx([0.0, 0.7, -2.3, -0.3])


def test_a_preference_for_letters_does_not_favour_the_baselines_best(make_settings: MakeSettings) -> None:
    """With answers that depend on the letter alone, candidate 0, the anchor, is first as rarely as any other."""
    settings = make_settings(Path(), mode="choice", window=5)
    scorer = Preferences({"standard_reid": [0.0] * 9}, bias=[4.0, 3.0, 2.0, 1.0, 0.0])
    queries = [Query(f"q{number}", "tiny:1", image=make_image(99)) for number in range(200)]
    candidates = [make_image(number) for number in range(9)]
    firsts = [rank(ask(settings, scorer, query, candidates))[0] for query in queries]
    assert firsts.count(0) < 0.4 * len(queries)


@pytest.mark.parametrize(("ask", "calls"), [(choose_in_windows, [12]), (choose_in_turns, [10, 2])])
def test_windows_and_shifts_are_asked_at_once(ask: Callable[..., Any], calls: list[int]) -> None:
    asked: list[int] = []

    def choose(windows: Sequence[Sequence[int]]) -> Any:
        asked.append(len(windows))
        return [[-float(place) for place in places] for places in windows]

    ask(choose, 25, 5, 2, "q", 0)
    assert asked[: len(calls)] == calls


@pytest.mark.parametrize(("mode", "count"), [("choice", 37), ("turns", 37), ("turns", 4), ("turns", 130)])
def test_asks_no_more_than_a_dry_run_says(make_settings: MakeSettings, mode: str, count: int) -> None:
    scorer = Preferences({"standard_reid": np.random.default_rng(0).normal(size=count).tolist()})
    settings = make_settings(Path(), mode=mode, window=5, shifts=2)
    ask(settings, scorer, IMAGE_QUERY, [make_image(i) for i in range(count)])
    said = int(describe_cost(settings.scoring, count, 1).split("at most ")[1].split()[0].replace(",", ""))
    assert 0.5 * said <= len(scorer.questions) <= said


def test_one_list_costs_a_turn_less_than_its_candidates() -> None:
    assert [count_turn_questions(count, 10, 1) for count in (1, 2, 10)] == [0, 1, 9]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (IMAGE_QUERY, "standard_reid"),
        (BOTH_QUERY, "multimodal_retrieval"),
        (TEXT_QUERY, "text_to_image_reid"),
        (ATTRIBUTE_QUERY, "attribute_retrieval"),
    ],
)
def test_asks_the_choice_that_fits_the_query(make_settings: MakeSettings, query: Query, expected: str) -> None:
    assert pick_task(make_settings(Path()), query) == expected
    chosen = make_settings(Path(), choice_task="cloth_changing_reid")
    assert pick_task(chosen, query) == "cloth_changing_reid"


@pytest.mark.parametrize(
    ("protocol", "expected"), [("ltcc", "cloth_changing_reid"), ("regdb", "visible_infrared_reid")]
)
def test_asks_the_choice_that_fits_the_protocol(make_settings: MakeSettings, protocol: str, expected: str) -> None:
    settings = alter(make_settings(Path()), {"protocol": protocol})
    assert pick_task(settings, IMAGE_QUERY) == expected


@pytest.mark.parametrize(
    ("changes", "given", "expected"),
    [
        ({}, "margins", "margins"),
        ({"mode": "choice"}, "margins", "log_odds"),
        ({"mode": "turns"}, "margins", "order"),
        ({"mode": "choice"}, "answers", "answers"),
        ({"mode": "choice"}, "none", "none"),
        ({"text_weight": 1.0}, "margins", "standardised"),
    ],
)
def test_mode_says_what_its_scores_are(
    make_settings: MakeSettings, changes: dict[str, Any], given: Any, expected: str
) -> None:
    assert name_scores(make_settings(Path(), **changes).scoring, [BOTH_QUERY], given) == expected


def test_image_with_attributes_is_asked_in_two_questions(make_settings: MakeSettings) -> None:
    query = Query("q", "tiny:1", image=make_image(99), attributes={"hat": "none"})
    assert name_scores(make_settings(Path()).scoring, [query], "margins") == "standardised"
    scorer = Preferences({IMAGE_PAIR: [1.0, 3.0], ATTRIBUTE_PAIR: [5.0, 1.0]})
    assert ask(make_settings(Path()), scorer, query, [make_image(0), make_image(1)]).tolist() == [0.0, 0.0]


def test_refuses_a_choice_task_without_letters(make_settings: MakeSettings) -> None:
    with pytest.raises(ValueError, match="choice_task: image_to_image_one_to_one is none of"):
        make_settings(Path(), choice_task=IMAGE_PAIR)


def test_refuses_answers_that_are_no_numbers(make_settings: MakeSettings) -> None:
    scorer = Preferences({"standard_reid": [0.0, float("nan")]})
    with pytest.raises(UpstreamError, match="NaN or infinite"):
        ask(make_settings(Path(), mode="choice"), scorer, IMAGE_QUERY, [make_image(0), make_image(1)])


@pytest.mark.parametrize("mode", ["choice", "turns"])
def test_a_perfect_chooser_ranks_perfectly(
    make_world: Callable[..., Path], make_settings: MakeSettings, mode: str
) -> None:
    settings = make_settings(make_world(), mode=mode, window=4)
    run_evaluation(settings)
    results = json.loads((settings.output.output_dir / "results.json").read_text(encoding="utf-8"))
    assert results["metrics"]["mAP"] == 1.0


@cache
def learn_first_letters(matches: frozenset[int], size: int) -> Any:
    """Return the logits (N,) of an ideal model: the shares of first letters among the answers that training shows."""
    counts = np.full(size, 0.01)
    if not matches:
        return np.log(counts)
    images = (ImageReference(""),) * (1 + size)
    for number in range(60):
        answer = render_answer(Instruction(f"{number}", "standard_reid", images, 1, Answer(tuple(matches))))
        counts[LETTERS.index(answer[0])] += 1
    return np.log(counts)


class IdealChooser(Preferences):
    """Answers as the training records do; the first candidates, by number, are the matches."""

    def __init__(self, matches: int) -> None:
        super().__init__({})
        self.matches = matches

    def choose(self, query: Query, windows: Sequence[Sequence[ImageRecord]], task: str) -> Any:
        return [
            learn_first_letters(
                frozenset(place for place, image in enumerate(window) if int(image.image_id) < self.matches),
                len(window),
            )
            for window in windows
        ]


@pytest.mark.parametrize("mode", ["choice", "turns"])
@pytest.mark.parametrize("matches", [1, 5, 15, 30])
@pytest.mark.parametrize("best", ["a match", "none"])
def test_model_that_learnt_the_answers_perfectly_ranks_all_matches_first(
    make_settings: MakeSettings, mode: str, matches: int, best: str
) -> None:
    candidates = [make_image(i) for i in range(100)]
    if best == "none":  # what the baseline puts first, which stands in every window, is no match
        candidates.reverse()
    scores = ask(make_settings(Path(), mode=mode, window=10), IdealChooser(matches), IMAGE_QUERY, candidates)
    relevant = np.array([int(image.image_id) < matches for image in candidates])
    found = np.flatnonzero(relevant[np.argsort(-scores, kind="stable")])
    assert np.mean(np.arange(1, matches + 1) / (found + 1)) >= 0.99


def test_modes_have_scores_of_their_own(make_settings: MakeSettings) -> None:
    changes: list[dict[str, Any]] = [{}, {"mode": "choice"}, {"mode": "choice", "window": 7}, {"mode": "turns"}]
    prints = [describe_fingerprint(make_settings(Path(), **change), OracleScorer([], [])) for change in changes]
    assert all(one != other for i, one in enumerate(prints) for other in prints[:i])

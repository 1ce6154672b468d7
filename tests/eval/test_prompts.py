"""Tests of chatreid_plugin.eval.questions: an evaluation asks in the words and the image order of training."""

import runpy
import sys
from pathlib import Path

import pytest
import yaml

from chatreid_plugin.datasets.benchmark import Query, make_image_query
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.questions import (
    ATTRIBUTE_PAIR,
    IMAGE_PAIR,
    MULTIMODAL_PAIR,
    PAIR_TASKS,
    TEXT_PAIR,
    build_choice_prompt,
    build_pair_prompt,
    can_ask,
    list_pair_tasks,
)
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.tasks import TASKS


IMAGE = ImageRecord("tiny/a.png", "tiny", "query", "a.png", "tiny:1", "2", 24, 48, clothes_id="1")
WORDS = Query("q", "tiny:1", text="A man in a red coat.")
ATTRIBUTES = Query("q", "tiny:1", attributes={"upper_colour": "red", "hat": "no"})
IMAGE_AND_ATTRIBUTES = Query("q", "tiny:1", image=IMAGE, attributes={"hat": "no"})
REPOSITORY = Path(__file__).parents[2]
RUN_PROTOCOLS = REPOSITORY / "tests" / "bench" / "run_protocols.py"
BOTH = Query("q", "tiny:1", image=IMAGE, text="He carries a bag.")


def test_image_query_keeps_the_labels_of_its_image() -> None:
    query = make_image_query(IMAGE)
    assert (query.query_id, query.person_id, query.camera_id, query.clothes_id) == ("tiny/a.png", "tiny:1", "2", "1")
    assert query.label == "a.png"


def test_pair_prompt_is_the_first_wording_of_the_task() -> None:
    prompt = build_pair_prompt(make_image_query(IMAGE), IMAGE_PAIR)
    assert "{image}".join(prompt.segments) == TASKS[IMAGE_PAIR].prompts[0]
    assert prompt.image_count == 2
    prompt = build_pair_prompt(WORDS, TEXT_PAIR)
    assert prompt.segments == (
        "Does the image ",
        ' of the pedestrian match the following caption: "A man in a red coat."',
    )


def test_attributes_are_asked_in_words() -> None:
    prompt = build_pair_prompt(ATTRIBUTES, ATTRIBUTE_PAIR)
    assert prompt.segments[1].endswith("have these attributes: upper colour: red, hat: no?")


def test_image_and_text_are_asked_together_the_query_first() -> None:
    before, between, _ = build_pair_prompt(BOTH, MULTIMODAL_PAIR).segments
    assert "query" in before and '"He carries a bag."' in between


@pytest.mark.parametrize(
    ("query", "tasks"),
    [
        (make_image_query(IMAGE), [IMAGE_PAIR]),
        (WORDS, [TEXT_PAIR]),
        (ATTRIBUTES, [ATTRIBUTE_PAIR]),
        (BOTH, [MULTIMODAL_PAIR]),
        (IMAGE_AND_ATTRIBUTES, [IMAGE_PAIR, ATTRIBUTE_PAIR]),
    ],
)
def test_a_query_is_asked_with_what_it_has(query: Query, tasks: list[str]) -> None:
    assert list_pair_tasks(query) == tasks
    possible = {task for task in PAIR_TASKS if can_ask(query, task)}
    assert set(tasks) <= possible
    for task in set(PAIR_TASKS) - possible:
        with pytest.raises(ConfigError, match="cannot be asked of query"):
            build_pair_prompt(query, task)


def test_image_and_text_are_two_questions_where_the_text_has_a_weight() -> None:
    assert list_pair_tasks(BOTH, separately=True) == [IMAGE_PAIR, TEXT_PAIR]
    assert list_pair_tasks(make_image_query(IMAGE), separately=True) == [IMAGE_PAIR]


def test_every_question_is_in_stage_3s_shipped_mix(layouts_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of ``eval/`` asks what no task has trained; ``run_protocols.py --questions`` prints the table."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds a folder
    lines = runpy.run_path(str(RUN_PROTOCOLS))["list_questions"](layouts_root)
    assert {line[0] for line in lines} == {path.stem for path in (REPOSITORY / "eval").glob("*.yaml")}
    assert [line for line in lines if not all(line)] == []
    assert {line[3] for line in lines if line[1] == "pointwise"} == {*PAIR_TASKS}
    assert {mode for name, mode, *_ in lines if name == "ltcc_cc"} == {"pointwise", "choice, turns"}
    for recipe in ("data_engine.yaml", "data_engine_full.yaml"):
        ratios = yaml.safe_load((REPOSITORY / "examples" / recipe).read_text(encoding="utf-8"))["stage3_ratios"]
        assert all(ratios[line[3]] > 0 for line in lines)
        assert sum(ratios[task] for task in PAIR_TASKS) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("query", "task", "own"),
    [
        (BOTH, "standard_reid", 1),
        (BOTH, "multimodal_retrieval", 1),
        (WORDS, "text_to_image_reid", 0),
        (ATTRIBUTES, "attribute_retrieval", 0),
    ],
)
def test_choice_prompt_letters_the_candidates(query: Query, task: str, own: int) -> None:
    prompt = build_choice_prompt(query, task, 3)
    assert prompt.image_count == own + 3
    letters = [segment.rstrip()[-2:] for segment in prompt.segments[own : own + 3]]
    assert letters == ["A:", "B:", "C:"]


def test_choice_prompt_refuses_what_it_cannot_ask() -> None:
    with pytest.raises(ConfigError, match="no letter|does not choose"):
        build_choice_prompt(BOTH, IMAGE_PAIR, 3)
    with pytest.raises(DataError, match="26 letters"):
        build_choice_prompt(BOTH, "standard_reid", 27)
    with pytest.raises(ConfigError, match="no yes/no answer"):
        build_pair_prompt(BOTH, "standard_reid")

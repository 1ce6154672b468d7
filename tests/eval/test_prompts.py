"""Tests of chatreid_plugin.eval.prompts: an evaluation asks in the words of training, images in training's order."""

import pytest

from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.prompts import (
    IMAGE_PAIR,
    TEXT_PAIR,
    build_choice_prompt,
    build_pair_prompt,
    list_pair_tasks,
)
from chatreid_plugin.eval.queries import Query, make_image_query
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.tasks import TASKS


IMAGE = ImageRecord("tiny/a.png", "tiny", "query", "a.png", "tiny:1", "2", 24, 48, clothes_id="1")
WORDS = Query("q", "tiny:1", text="A man in a red coat.")
ATTRIBUTES = Query("q", "tiny:1", attributes={"upper_colour": "red", "hat": "no"})
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
    assert build_pair_prompt(ATTRIBUTES, TEXT_PAIR).segments[1].endswith('"upper colour: red, hat: no"')


@pytest.mark.parametrize(
    ("query", "tasks"),
    [
        (make_image_query(IMAGE), [IMAGE_PAIR]),
        (WORDS, [TEXT_PAIR]),
        (ATTRIBUTES, [TEXT_PAIR]),
        (BOTH, [IMAGE_PAIR, TEXT_PAIR]),
    ],
)
def test_a_query_is_asked_with_what_it_has(query: Query, tasks: list[str]) -> None:
    assert list_pair_tasks(query) == tasks
    for task in {IMAGE_PAIR, TEXT_PAIR} - set(tasks):
        with pytest.raises(ConfigError, match="cannot be asked of query"):
            build_pair_prompt(query, task)


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

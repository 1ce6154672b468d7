"""Tests of chatreid_plugin.answers: replies are read back, whatever a model writes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatreid_plugin.answers import read_answer
from chatreid_plugin.records import Answer
from chatreid_plugin.tasks import TASKS, format_chat_prompt


def test_chat_prompt_ends_where_the_answer_starts() -> None:
    assert format_chat_prompt("Hello <image>{x}") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello <image>{x}<|im_end|>\n<|im_start|>assistant\n"
    )


@settings(deadline=None)
@given(st.sampled_from(sorted(TASKS)), st.text(), st.integers(0, 40))
def test_reading_never_raises_and_stays_inside_the_options(name: str, text: str, options: int) -> None:
    answer = read_answer(name, text, options)
    assert all(0 <= index < options for index in answer.indices)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", True),
        ("yes, they are.", True),
        ("NO.", False),
        ("I think no", False),
        ("They know", None),
        ("", None),
        ("ye\u017f", None),  # a long s, which equals s when case is ignored
    ],
)
def test_yes_and_no_are_found_in_a_reply(text: str, expected: bool | None) -> None:
    assert read_answer("image_to_image_one_to_one", text) == Answer(match=expected)


@pytest.mark.parametrize(
    ("task", "text", "options", "expected"),
    [
        ("standard_reid", "C and A", 3, (0, 2)),
        ("standard_reid", "Images: B, B, D", 3, (1,)),
        ("standard_reid", "None of them", 3, ()),
        ("standard_reid", "BC", 3, ()),
        ("text_to_image_many_to_one", "the THIRD caption", 3, (2,)),
        ("text_to_image_many_to_one", "the third caption", 2, ()),
        ("text_to_image_many_to_one", "secondly", 3, ()),
        ("text_to_image_many_to_one", "the first caption", 0, ()),
    ],
)
def test_choices_are_found_in_a_reply(task: str, text: str, options: int, expected: tuple[int, ...]) -> None:
    assert read_answer(task, text, options) == Answer(expected)

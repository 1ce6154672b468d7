"""Tokens of a record put together, against LLaMA-Factory's own encoding of the whole text with every image token."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatreid_plugin.errors import DataError
from chatreid_plugin.records import Answer, Attribute, ImageReference, Instruction, Turn
from chatreid_plugin.tasks import ASKED, OWN_VARIANT, TASKS
from chatreid_plugin.training.cutoff import REMEMBERED_TEXTS, ROW_COLUMN, RememberingTokenizer
from chatreid_plugin.training.loader import convert_record


# Composed and decomposed accents, right-to-left, astral, control and white space; what looks like a mark or a field.
PIECES = (
    *("é", "e\u0301", "שלום", "行人", "\U0001f469\U0001f3fd\u200d\U0001f9b1", "\x00", "\r\n\n", "\t ", "\u200b"),
    *("<|im_end|>", "<image>", "<|im", "|>", "{image}", "pad"),
)
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=12), min_size=1, max_size=6).map("".join)
ODD_WORDING = "行人 {image}\n\n{gallery}é"


@st.composite
def draw_records(draw: Callable[..., Any]) -> Instruction:
    """Return a record of any task, with images of any size and odd texts; some do not fit their task."""
    task = TASKS[draw(st.sampled_from(sorted(TASKS)))]
    marks = task.prompts[0].count("{image}")
    gallery = draw(st.integers(1, 8)) if "{gallery}" in task.prompts[0] else 0
    sizes = st.tuples(st.integers(20, 400), st.integers(20, 400))
    images = tuple(ImageReference(f"{n}.jpg", *draw(sizes)) for n in range(marks + gallery))
    captions = draw(st.lists(TEXTS, min_size=2, max_size=4)) if "{captions}" in task.prompts[0] else [draw(TEXTS)]
    positions = [ASKED, *range(len(images))]
    attributes = tuple(Attribute(position, "upper colour", draw(TEXTS)) for position in positions)
    answer = Answer((0,), match=True, text=draw(TEXTS))
    variant = draw(st.sampled_from([0, 1, OWN_VARIANT]))
    turns = tuple(Turn((0,), 0, draw(TEXTS)) for _ in task.follow_ups)
    return Instruction("r", task.name, images, marks, answer, tuple(captions), attributes, "tiny", variant, turns)


def make_guard(name: str, tokenizer_module: dict[str, Any]) -> Any:
    """Return the dataset processor of a template, with the cutoff guard before LLaMA-Factory's own."""
    from llamafactory.data import get_template_and_fix_tokenizer, loader
    from llamafactory.hparams.parser import DataArguments

    arguments: Any = DataArguments(template=name, cutoff_len=100_000)
    arguments.packing = False
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], arguments)
    return loader._get_dataset_processor(arguments, "sft", template, **tokenizer_module)


@pytest.fixture(scope="module")
def guards(tokenizer_module: dict[str, Any]) -> list[Any]:
    """Return the dataset processors of all our templates."""
    from llamafactory.data.template import TEMPLATES

    return [make_guard(name, tokenizer_module) for name in sorted(TEMPLATES) if name.startswith("chatreid")]


@settings(max_examples=200, deadline=None)
@given(record=draw_records())
def test_tokens_and_labels_are_those_of_the_whole_text(guards: list[Any], record: Instruction) -> None:
    own = (ODD_WORDING,) if record.task == "standard_reid" else ()
    try:
        aligned = convert_record(record, "/images", own)
        source = aligned.pop(ROW_COLUMN)
    except DataError:  # nothing is left of a text without its marks
        return
    columns = {name: [value] for name, value in aligned.items()}
    for guard in guards:
        found = guard.preprocess_dataset(columns | {ROW_COLUMN: [source]})
        whole = guard.processor.preprocess_dataset(columns)
        assert dict(found) == dict(whole)
        # Images are single tokens there.
        assert guard.uncut.preprocess_dataset(columns)["input_ids"] != whole["input_ids"]


def test_remembered_ids_are_the_tokenizers_and_safe_from_changes(
    tokenizer_module: dict[str, Any],
) -> None:
    tokenizer = tokenizer_module["tokenizer"]
    remembering = RememberingTokenizer(tokenizer)
    expected = tokenizer.encode("A man in red.", add_special_tokens=False)
    remembering.encode("A man in red.", add_special_tokens=False).append(7)
    assert remembering.encode("A man in red.", add_special_tokens=False) == expected
    assert remembering.eos_token_id == tokenizer.eos_token_id


def test_memory_is_bounded_and_not_pickled(tokenizer_module: dict[str, Any]) -> None:
    remembering = RememberingTokenizer(tokenizer_module["tokenizer"])
    for number in range(REMEMBERED_TEXTS + 5):
        remembering.encode(f"{number}")
    assert remembering._encode.cache_info().currsize == REMEMBERED_TEXTS
    copied = pickle.loads(pickle.dumps(remembering))
    assert copied._encode.cache_info().currsize == 0
    assert copied.encode("A man.") == remembering.encode("A man.")


def test_records_of_one_wording_are_encoded_once(tokenizer_module: dict[str, Any]) -> None:
    guard = make_guard("chatreid", tokenizer_module)
    images = tuple(ImageReference(f"{n}.jpg", 56, 112) for n in range(4))
    first = Instruction("a", "standard_reid", images, 1, Answer((0,)))
    other = replace(first, id="b", images=tuple(replace(image, width=84) for image in images))
    encode = guard.uncut.tokenizer._encode
    for record in (first, other):
        columns = {name: [value] for name, value in convert_record(record, "/images").items()}
        guard.preprocess_dataset(columns)
    assert encode.cache_info().hits == encode.cache_info().misses == 3  # system prompt, question, answer

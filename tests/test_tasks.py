"""Tests of chatreid_plugin.tasks: the paper's words, the answers, and reading them back."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from chatreid_plugin.answers import read_answer, render_answer, render_turns
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import Answer, Attribute, ImageReference, Instruction, Turn
from chatreid_plugin.tasks import (
    LETTER_KINDS,
    LETTERS,
    ORDINALS,
    TASKS,
    Task,
    get_task,
    list_stage_tasks,
    render_prompt,
)


STAGE_2_TASKS = [
    "image_to_image_one_to_one",
    "image_to_image_many_to_many",
    "text_to_image_one_to_one",
    "text_to_image_many_to_one",
    "text_to_image_one_to_many",
    "attribute_comparison",
    "attribute_prediction",
]
STAGE_3_TASKS = [
    "image_to_image_one_to_one",
    "text_to_image_one_to_one",
    "standard_reid",
    "cloth_changing_reid",
    "visible_infrared_reid",
    "text_to_image_reid",
    "attribute_retrieval",
    "multimodal_retrieval",
    "dialogue_retrieval",
    "attribute_one_to_one",
    "multimodal_one_to_one",
]
# The paper tells of these three (section 3.3) without giving a prompt; the pair forms are ours.
WITHOUT_PAPER_PROMPT = {"attribute_retrieval", "multimodal_retrieval", "dialogue_retrieval"}
WITHOUT_PAPER_PROMPT |= {"attribute_one_to_one", "multimodal_one_to_one"}
ALL_VARIANTS = [(task, variant) for task in TASKS.values() for variant in range(len(task.prompts))]

# The prompts of sections 3.1.1 and 3.1.3 and of figure 4, as the paper prints them.
PAPER_PROMPTS = {
    "image_captioning": (
        "In the {person image} provided, can you give a detailed description of the pedestrian, including their "
        "gender, age range, hair, type and color of clothing, footwear type and color, posture or gait, any patterns "
        "or accessories, and any distinguishing features?"
    ),
    "image_to_image_one_to_one": "Do these two images <[ ]> contain the same pedestrian identity?",
    "image_to_image_many_to_many": (
        "Given the query image <[ ]> of a pedestrian and a gallery set <[ ]>. Please select all images from gallery "
        "set, that match the identity of the pedestrian in the query image."
    ),
    "text_to_image_one_to_one": 'Does the image <[ ]> of the pedestrian match the following caption: "..."',
    "text_to_image_many_to_one": (
        "Given the following image <[ ]>, which of the captions accurately describes it? "
        'The first caption: "...". The second caption: "...".'
    ),
    "text_to_image_one_to_many": (
        'Select the image that best matches the following description of the pedestrian\'s appearance: "..."'
    ),
    "attribute_comparison": (
        "Given the first images <[ ]> and the second image <[ ]>, please describe the similarities and differences "
        "between them. Focus on the attributes of the pedestrians in each image."
    ),
    "attribute_prediction": (
        "Examine the image <[ ]> below and select the correct attribute annotations for the pedestrian."
    ),
    "standard_reid": (
        "Given the {person image} provided, identify which of the following images show the same pedestrian as in the "
        "first image."
    ),
    "cloth_changing_reid": (
        "Given the {person image} provided, select which of the {gallery} shows the same person, who may be wearing "
        "different clothing."
    ),
    "visible_infrared_reid": (
        "Using the given {person image}, choose the corresponding {gallery} that matches the same pedestrian, "
        "considering both infrared and visible light images for re-identification."
    ),
    "text_to_image_reid": (
        "Select the {person image} that best matches the following description of the pedestrian's appearance: {text}"
    ),
}


def make_record(task: str, gallery: int = 2, described: int = 2, variant: int = 0, **changes: Any) -> Instruction:
    """Return a record of a task whose answer is the option at position 1, or yes.

    ``gallery`` and ``described`` (captions) are counts, for the tasks that have a gallery or a choice of captions.
    """
    kind = TASKS[task].answer_kind
    wording = TASKS[task].prompts[0]
    queries = wording.count("{image}")
    gallery = gallery if "{gallery}" in wording else 0
    described = described if "{captions}" in wording else wording.count("{caption}")
    values: dict[str, Any] = {
        "id": "record-7",
        "task": task,
        "images": tuple(ImageReference(f"{number}.jpg", 64, 128) for number in range(queries + gallery)),
        "query_images": queries,
        "captions": tuple(f"person number {number}" for number in range(described)),
        "answer": Answer(
            (1,) if kind in (*LETTER_KINDS, "ordinal") else (),
            True if kind == "match" else None,
            "A person." if kind == "text" else None,
        ),
        "variant": variant,
    }
    if "{attributes}" in wording or "{words}" in wording:
        values["attributes"] = (Attribute(-1, "upper_colour", "red"), Attribute(-1, "hat", "none"))
    elif task.startswith("attribute"):
        values["attributes"] = (Attribute(0, "hat", "cap"), Attribute(1, "hat", "none"))
    return Instruction(**(values | changes))


def test_stages_hold_the_tasks_of_the_paper() -> None:
    assert [task.name for task in list_stage_tasks(1)] == ["image_captioning"]
    assert [task.name for task in list_stage_tasks(2)] == STAGE_2_TASKS
    assert [task.name for task in list_stage_tasks(3)] == STAGE_3_TASKS
    assert {stage for task in TASKS.values() for stage in task.stages} == {1, 2, 3}


@pytest.mark.parametrize("name", PAPER_PROMPTS)
def test_first_wording_is_the_papers(name: str) -> None:
    prompt = render_prompt(make_record(name))
    # The paper's <[ ]> stands for one image, for the pair, or for the gallery.
    pieces = re.split(r"<\[ \]>|\{person image\}|\{gallery\}|\{text\}|\.\.\.", PAPER_PROMPTS[name])
    if "{text}" in PAPER_PROMPTS[name]:
        # Quotation marks, which figure 4 has, show where the description ends.
        prompt = prompt.replace('"', "")
    shown = r"(?:(?:[A-Z]: )?<image>(?:\s(?=[A-Z]: ))?)+|person number \d"
    ours = re.split(shown, prompt)
    if name in ("text_to_image_one_to_many", "standard_reid"):
        assert prompt.startswith(re.sub(r"\{person image\}", "<image>", PAPER_PROMPTS[name].split("...")[0]))
        assert prompt.endswith(" A: <image> B: <image>")
    else:
        assert ours == pieces


def test_every_task_has_a_paper_wording_in_this_test() -> None:
    assert set(PAPER_PROMPTS) == set(TASKS) - WITHOUT_PAPER_PROMPT


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("image_to_image_many_to_many", "B match the identity of the pedestrian in the query image."),
        ("text_to_image_many_to_one", "The second caption"),
        ("text_to_image_one_to_many", "B matches the following description."),
        ("attribute_prediction", "The pedestrian attributes of this image are: hat: cap"),
        *((task, "Yes" if task.endswith("one_to_one") else "B") for task in STAGE_3_TASKS),
        ("image_captioning", "A person."),
    ],
)
def test_answers_are_written_as_in_figure_4(task: str, expected: str) -> None:
    changes = {"attributes": (Attribute(0, "hat", "cap"),)} if task == "attribute_prediction" else {}
    assert render_answer(make_record(task, **changes)) == expected


def test_no_is_written_as_no() -> None:
    assert render_answer(make_record("image_to_image_one_to_one", answer=Answer(match=False))) == "No"


def test_gallery_images_carry_letters_in_their_order() -> None:
    prompt = render_prompt(make_record("standard_reid", gallery=26))
    assert re.findall(r"([A-Z]): <image>", prompt) == list(LETTERS)


def test_attributes_asked_for_are_named_in_the_prompt() -> None:
    prompt = render_prompt(make_record("attribute_retrieval"))
    assert "these attributes: upper colour: red, hat: none? A: <image>" in prompt
    # Those of the images are the answer's, not the question's.
    attributes = (Attribute(-1, "hat", "cap"), Attribute(0, "bag", "backpack"))
    assert "backpack" not in render_prompt(make_record("attribute_retrieval", attributes=attributes))


def test_image_and_sentence_are_one_query() -> None:
    prompt = render_prompt(make_record("multimodal_retrieval", gallery=3))
    assert (
        prompt.index("<image>") < prompt.index('"person number 0"') < prompt.index("A: <image> B: <image> C: <image>")
    )


def test_captions_carry_ordinals_in_their_order() -> None:
    prompt = render_prompt(make_record("text_to_image_many_to_one", described=8))
    assert re.findall(r'The (\w+) caption: "person number (\d)"\.', prompt) == [
        (name, str(number)) for number, name in enumerate(ORDINALS)
    ]


def test_each_match_is_named_once_and_first_equally_often() -> None:
    record = make_record("standard_reid", gallery=5, answer=Answer((4, 0, 2, 4)))
    answers = [render_answer(replace(record, id=f"record-{number}")) for number in range(3000)]
    assert {tuple(sorted(answer.split(", "))) for answer in answers} == {("A", "C", "E")}
    assert chisquare(list(Counter(answers).values())).pvalue > 0.001
    assert len(set(answers)) == 6


def test_order_of_the_letters_is_the_records_own() -> None:
    record = make_record("standard_reid", gallery=5, answer=Answer((4, 0, 2)))
    assert render_answer(record) == render_answer(replace(record, answer=Answer((0, 2, 4))))


def test_letters_of_a_further_turn_come_in_an_order_of_their_own() -> None:
    record = make_record("dialogue_retrieval", gallery=3, answer=Answer((0, 2)), turns=(Turn((0, 2), 0, "A man."),))
    orders = [
        tuple(answer for _, answer in render_turns(replace(record, id=f"record-{number}"))) for number in range(2000)
    ]
    counts = Counter(orders)
    assert set(counts) == {(first, second) for first in ("A, C", "C, A") for second in ("A, C", "C, A")}
    assert chisquare(list(counts.values())).pvalue > 0.001


def test_words_of_two_people_are_alternatives() -> None:
    record = make_record("dialogue_retrieval", captions=("a man", "a woman"), attributes=())
    assert 'described as "a man" or "a woman"? A: <image>' in render_prompt(record)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": (Turn((0,), 0, "a"),) * 3}, "has 4 turns, but task dialogue_retrieval has at most 3"),
        ({"turns": (Turn((0,), 2, "a"),)}, "turn 2 confirms image 2, which is outside the gallery of 2"),
        ({"turns": (Turn((0,), None, "a"),)}, "turn 2 confirms image None"),
        ({"turns": (Turn((0,), 0),)}, "turn 2 adds neither a caption nor an attribute"),
        ({"turns": (Turn((2,), 0, "a"),)}, "/2: answer index 2 is outside the 2 options"),
        ({"turns": (Turn((), 0, "a"),)}, r"/2: answer index \(none\) is outside"),
        ({"attributes": ()}, "needs attributes, or captions that are not empty"),
        ({"attributes": (), "captions": ("a", "<image>")}, "needs attributes, or captions that are not empty"),
    ],
)
def test_dialogue_that_does_not_fit_is_refused_with_the_record(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"Record record-7.*{message}"):
        render_turns(make_record("dialogue_retrieval", **changes))


def test_turns_of_a_task_that_has_one_are_refused() -> None:
    record = make_record("attribute_retrieval", turns=(Turn((0,), 0, "a"),))
    with pytest.raises(DataError, match="Record record-7 has 2 turns, but task attribute_retrieval has at most 1"):
        render_turns(record)


def test_comparison_names_common_and_unique_attributes() -> None:
    attributes = (
        Attribute(0, "upper_colour", "red"),
        Attribute(0, "hat", "cap"),
        Attribute(0, "bag", "backpack"),
        Attribute(1, "upper_colour", "red"),
        Attribute(1, "hat", "no hat"),
        Attribute(1, "hair", "short"),
    )
    assert render_answer(make_record("attribute_comparison", attributes=attributes)) == (
        "Common Attributes: upper colour: red. "
        "Unique Attributes of the First Image: hat: cap, bag: backpack. "
        "Unique Attributes of the Second Image: hat: no hat, hair: short."
    )


def test_comparison_says_none_when_nothing_is_common_or_unique() -> None:
    same = (Attribute(0, "hat", "cap"), Attribute(1, "hat", "cap"))
    answer = render_answer(make_record("attribute_comparison", attributes=same))
    assert answer.count(": none.") == 2
    other = (Attribute(0, "hat", "cap"), Attribute(1, "hat", "hood"))
    assert "Common Attributes: none." in render_answer(make_record("attribute_comparison", attributes=other))


@pytest.mark.parametrize(("task", "variant"), ALL_VARIANTS, ids=lambda value: getattr(value, "name", value))
@settings(max_examples=40, deadline=None)
@given(gallery=st.integers(1, 26), described=st.integers(2, 8), spoiled=st.booleans())
def test_prompt_has_one_mark_for_each_image(
    task: Task, variant: int, gallery: int, described: int, spoiled: bool
) -> None:
    record = make_record(task.name, gallery, described, variant)
    if spoiled:
        captions = tuple(f"<image>{text} {{image}} {{gallery}}<|image_pad|>" for text in record.captions)
        record = replace(record, captions=captions)
    prompt = render_prompt(record)
    assert prompt.count("<image>") == len(record.images)
    assert prompt.count("person number") == len(record.captions)
    assert "<|" not in prompt


@pytest.mark.parametrize(
    "mark",
    [
        "<image>",
        "<video>",
        "<audio>",
        "<|im_end|>",
        "<|im_start|>",
        "<|image_pad|>",
        "<|vision_start|>",
        "<ima<image>ge>",
    ],
)
def test_marks_are_removed_from_captions_and_answers(mark: str) -> None:
    record = make_record("text_to_image_one_to_one", captions=(f"{mark}person number 0{mark}",))
    assert render_prompt(record) == render_prompt(make_record("text_to_image_one_to_one"))
    assert render_answer(make_record("image_captioning", answer=Answer(text=f"Tall{mark}."))) == "Tall."
    attributes = (Attribute(0, "hat", f"cap{mark}"),)
    assert render_answer(make_record("attribute_prediction", attributes=attributes)).endswith("are: hat: cap")


def test_braces_in_a_caption_stay_as_they_are() -> None:
    prompt = render_prompt(make_record("text_to_image_one_to_one", captions=("logo {image} and {captions}",)))
    assert '"logo {image} and {captions}"' in prompt


@pytest.mark.parametrize("variant", [0, 1, 2, 3, 99])
def test_variant_beyond_the_wordings_starts_again(variant: int) -> None:
    prompts = TASKS["image_captioning"].prompts
    prompt = render_prompt(make_record("image_captioning", variant=variant))
    assert prompt == prompts[variant % 3].replace("{image}", "<image>")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (make_record("standard_reid", gallery=3, answer=Answer((1, 3))), "index 3 is outside the 3 options"),
        (make_record("standard_reid", gallery=3, answer=Answer((-1,))), "index -1 is outside"),
        (make_record("standard_reid", gallery=3, answer=Answer()), r"index \(none\) is outside"),
        (make_record("text_to_image_many_to_one", answer=Answer((2,))), "index 2 is outside the 2 options"),
        (make_record("text_to_image_many_to_one", answer=Answer((0, 1))), "one right caption"),
        (make_record("image_to_image_one_to_one", answer=Answer((1,))), "needs a yes/no answer"),
        (make_record("image_captioning", answer=Answer()), "has no answer text"),
        (make_record("image_captioning", answer=Answer(text=" <image> ")), "has no answer text"),
        (make_record("attribute_prediction", attributes=()), "has no answer text"),
    ],
)
def test_answer_that_does_not_fit_is_refused_with_the_record(record: Instruction, message: str) -> None:
    with pytest.raises(DataError, match=f"Record record-7.*{message}"):
        render_answer(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (make_record("image_to_image_one_to_one", images=(ImageReference("a"),)), r"asks for 2 image\(s\).* has 1"),
        (make_record("standard_reid", gallery=27), "27 gallery images, but there are 26 letters"),
        (make_record("text_to_image_one_to_one", captions=()), "needs one caption"),
        (make_record("text_to_image_one_to_one", captions=("a", "b")), "needs one caption"),
        (make_record("text_to_image_one_to_one", captions=("<image> ",)), "not empty"),
        (make_record("text_to_image_many_to_one", captions=("a",)), "needs 2 to 8 captions"),
        (make_record("text_to_image_many_to_one", described=9), "needs 2 to 8 captions"),
        (make_record("text_to_image_many_to_one", captions=("a", "")), "none empty"),
        (make_record("text_to_image_reid", captions=()), "needs one caption"),
        (make_record("multimodal_retrieval", captions=()), "needs one caption"),
        (make_record("multimodal_retrieval", query_images=2), r"asks for 2 image\(s\).* has 3"),
        (make_record("attribute_retrieval", attributes=()), "asks for attributes, but the record has none"),
        (make_record("attribute_retrieval", attributes=(Attribute(0, "hat", "cap"),)), "asks for attributes"),
    ],
)
def test_prompt_that_does_not_fit_is_refused_with_the_record(record: Instruction, message: str) -> None:
    with pytest.raises(DataError, match=f"Record record-7.*{message}"):
        render_prompt(record)


def test_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="Record r1: unknown task 'swim'; known tasks: image_captioning, "):
        get_task("swim", "r1")
    with pytest.raises(DataError, match="^unknown task 'swim'"):
        read_answer("swim", "Yes")


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_answer_is_read_back_as_it_was(name: str, data: st.DataObject) -> None:
    kind = TASKS[name].answer_kind
    options = 0
    answer = Answer()
    if kind in LETTER_KINDS:
        options = data.draw(st.integers(1, 26))
        answer = Answer(tuple(sorted(data.draw(st.sets(st.integers(0, options - 1), min_size=1)))))
    elif kind == "ordinal":
        options = data.draw(st.integers(2, 8))
        answer = Answer((data.draw(st.integers(0, options - 1)),))
    elif kind == "match":
        answer = Answer(match=data.draw(st.booleans()))
    elif kind == "text":
        answer = Answer(text=data.draw(st.from_regex(r"[A-Za-z][a-z ]{0,20}[a-z]", fullmatch=True)))
    record = make_record(name, options, options, answer=answer)
    rendered = render_answer(record)
    expected = Answer(text=rendered) if kind in ("comparison", "attributes") else answer
    assert read_answer(name, rendered, options) == expected

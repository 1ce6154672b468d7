"""Every task in one table: its wordings and its kind of answer; training and evaluation both read it here.

``answers.py`` writes the answers and reads replies. The yes-or-no tasks of Stage 3 are the questions that pointwise
evaluation asks (section 4.1): two are Stage 2's, kept in, and two are ours, for attributes and for image with words.

Prompts are verbatim from the paper (section 3.1.1, figure 4, section 3.1.3) where the wording is the first of a
task; the others are ours, and so are all of attribute and multi-modal tasks, whose prompts the paper does not give
(section 3.3). ``{image}`` stands for one image, ``{gallery}`` for the lettered gallery, ``{caption}`` and
``{captions}`` for quoted descriptions, ``{attributes}`` for what is asked for, ``{words}`` for either of them,
``{letter}`` for the gallery image that the user of a dialogue confirms. Gallery images carry letters, since Qwen's
tokenizer splits "10" into two tokens and a letter is one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import DataError
from .records import Attribute, Instruction


AnswerKind = Literal["text", "match", "letters", "dialogue", "ordinal", "comparison", "attributes"]
# A dialogue's answers are letters in every turn; it has a kind of its own, since evaluation asks one turn.
LETTER_KINDS = ("letters", "dialogue")

IMAGE_MARK = "<image>"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
YES, NO = "Yes", "No"

# Qwen2-VL's chat template (its tokenizer_config.json), as LLaMA-Factory's template qwen2_vl writes it.
SYSTEM_PROMPT = "You are a helpful assistant."
CHAT_PROMPT = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
# Without one from the user, the chat templates of these give the system prompt; Qwen3-VL's does not.
PROMPTED_FAMILIES = ("qwen2_vl", "qwen2_5_vl")


@dataclass(frozen=True, slots=True)
class Task:
    """One task: the stages that train it, how its answer is written, its wordings (the paper's first).

    ``follow_ups`` has the wordings of each further turn; a record's variant chooses one of every turn.
    """

    name: str
    stages: tuple[int, ...]
    answer_kind: AnswerKind
    prompts: tuple[str, ...]
    answer_form: str = "{answer}"
    follow_ups: tuple[tuple[str, ...], ...] = ()


_TASKS = (
    Task(
        "image_captioning",
        (1,),
        "text",
        (
            "In the {image} provided, can you give a detailed description of the pedestrian, including their gender, "
            "age range, hair, type and color of clothing, footwear type and color, posture or gait, any patterns or "
            "accessories, and any distinguishing features?",
            "Describe the pedestrian in this image in detail: {image}",
            "{image} What does this person look like, and what are they wearing?",
        ),
    ),
    Task(
        "image_to_image_one_to_one",
        (2, 3),
        "match",
        (
            "Do these two images {image}{image} contain the same pedestrian identity?",
            "Is the person in the first image {image} the same as the person in the second image {image}?",
            "Compare the two pedestrians. First: {image} Second: {image} Are they one and the same person?",
        ),
    ),
    Task(
        "image_to_image_many_to_many",
        (2,),
        "letters",
        (
            "Given the query image {image} of a pedestrian and a gallery set {gallery}. Please select all images from "
            "gallery set, that match the identity of the pedestrian in the query image.",
            "Query: {image} Gallery: {gallery} Which gallery images show the person of the query image?",
        ),
        "{answer} match the identity of the pedestrian in the query image.",
    ),
    Task(
        "text_to_image_one_to_one",
        (2, 3),
        "match",
        (
            'Does the image {image} of the pedestrian match the following caption: "{caption}"',
            'Is this a correct description of the person in the image {image}? "{caption}"',
        ),
    ),
    Task(
        "text_to_image_many_to_one",
        (2,),
        "ordinal",
        (
            "Given the following image {image}, which of the captions accurately describes it? {captions}",
            "{captions} Which of these captions belongs to the image {image}?",
        ),
        "The {answer} caption",
    ),
    Task(
        "text_to_image_one_to_many",
        (2,),
        "letters",
        (
            "Select the image that best matches the following description of the pedestrian's appearance: "
            '"{caption}" {gallery}',
            'Description: "{caption}" Which of these images shows the person described? {gallery}',
        ),
        "{answer} matches the following description.",
    ),
    Task(
        "attribute_comparison",
        (2,),
        "comparison",
        (
            "Given the first images {image} and the second image {image}, please describe the similarities and "
            "differences between them. Focus on the attributes of the pedestrians in each image.",
            "First image: {image} Second image: {image} What do the two pedestrians have in common, and how do they "
            "differ?",
        ),
    ),
    Task(
        "attribute_prediction",
        (2,),
        "attributes",
        (
            "Examine the image {image} below and select the correct attribute annotations for the pedestrian.",
            "List the attributes of the pedestrian in this image: {image}",
        ),
        "The pedestrian attributes of this image are: {answer}",
    ),
    Task(
        "standard_reid",
        (3,),
        "letters",
        (
            "Given the {image} provided, identify which of the following images show the same pedestrian as in the "
            "first image. {gallery}",
            "The first image {image} shows a pedestrian. Which of these images show the same pedestrian? {gallery}",
        ),
    ),
    Task(
        "cloth_changing_reid",
        (3,),
        "letters",
        (
            "Given the {image} provided, select which of the {gallery} shows the same person, who may be wearing "
            "different clothing.",
            "Query: {image} Gallery: {gallery} Which gallery images show the person of the query image, possibly in "
            "other clothes?",
        ),
    ),
    Task(
        "visible_infrared_reid",
        (3,),
        "letters",
        (
            "Using the given {image}, choose the corresponding {gallery} that matches the same pedestrian, "
            "considering both infrared and visible light images for re-identification.",
            "Query: {image} Gallery: {gallery} One side was taken in infrared, the other in visible light. Which "
            "gallery images show the person of the query image?",
        ),
    ),
    Task(
        "text_to_image_reid",
        (3,),
        "letters",
        (
            "Select the {gallery} that best matches the following description of the pedestrian's appearance: "
            '"{caption}"',
            'Which of these images show the person described as "{caption}"? {gallery}',
        ),
    ),
    Task(
        "attribute_retrieval",
        (3,),
        "letters",
        (
            "Which of the following images show a pedestrian with these attributes: {attributes}? {gallery}",
            "{gallery} Select the images of people who have all of these attributes: {attributes}.",
        ),
    ),
    Task(
        "multimodal_retrieval",
        (3,),
        "letters",
        (
            'The query image {image} shows a pedestrian, described as: "{caption}" Which of the following images show '
            "the same pedestrian? {gallery}",
            'Query image: {image} What is known besides: "{caption}" Gallery: {gallery} Select the images of the '
            "person asked for.",
        ),
    ),
    Task(
        "dialogue_retrieval",
        (3,),
        "dialogue",
        (
            "Which of the following images show a pedestrian described as {words}? {gallery}",
            "{gallery} Select the images of people who fit this description: {words}.",
        ),
        follow_ups=(
            (
                "The person is {letter}, also described as {words}. Which of the images show this person?",
                "It is the person in {letter}. What is known besides: {words}. Select all images of this person.",
            ),
            (
                "In which of these images is the person seen with {words}?",
                "Keep only the images of this person that fit {words}.",
            ),
        ),
    ),
    Task(
        "attribute_one_to_one",
        (3,),
        "match",
        (
            "Does the pedestrian in {image} have these attributes: {attributes}?",
            "{image} Are these attributes true of the pedestrian shown: {attributes}?",
        ),
    ),
    Task(
        "multimodal_one_to_one",
        (3,),
        "match",
        (
            'The query image {image} shows a pedestrian, described as: "{caption}" Does the image {image} show the '
            "same pedestrian?",
            'Query image: {image} What is known besides: "{caption}" Is the person asked for in this image? {image}',
        ),
    ),
)

_FIELD = re.compile(r"\{(?:image|gallery|captions?|attributes|words|letter)\}")
# A user's wordings are numbered from here, so that new wordings of the table do not move them.
OWN_VARIANT = 100
# Position of an attribute that no image of the record is said to have: the query asks for it.
ASKED = -1

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def get_task(name: str, record_id: str = "") -> Task:
    """Return the task of this name.

    Raises:
        DataError: no such task.
    """
    if name not in TASKS:
        where = f"Record {record_id}: " if record_id else ""
        raise DataError(f"{where}unknown task {name!r}; known tasks: {', '.join(TASKS)}.")
    return TASKS[name]


def list_stage_tasks(stage: int) -> list[Task]:
    """Return the tasks that this stage trains, in the table's order."""
    return [task for task in _TASKS if stage in task.stages]


def find_default_system(family: str) -> str:
    """Return the system prompt of a family's template, empty for Qwen3-VL's, which has none of its own."""
    return SYSTEM_PROMPT if family in PROMPTED_FAMILIES else ""


def format_chat_prompt(content: str, family: str = "qwen2_vl", system: str | None = None) -> str:
    """Return the text that precedes the model's answer, with the user's ``content`` in it.

    Args:
        content: the user's message.
        family: the checkpoint's ``model_type``.
        system: the system prompt, empty for none; None for the family's own.
    """
    words = find_default_system(family) if system is None else system
    text = CHAT_PROMPT.format(system=words, content=content)
    return text if words else text[text.index("<|im_start|>user") :]


# What LLaMA-Factory replaces by an image, and what the tokenizer takes for a token of its own.
_MARK = re.compile(r"<(?:image|video|audio)>|<\|\w+\|>")


def clean_text(text: str) -> str:
    """Remove image marks and special tokens: in a caption they would be taken for real ones."""
    # Again and again, since taking the inner mark out of "<ima<image>ge>" leaves another one.
    while _MARK.search(text):
        text = _MARK.sub("", text)
    return text.strip()


def check_wording(task: Task, wording: str) -> str | None:
    """Return what is wrong with a user's wording of a task, or None: it has to name the same fields as the first."""
    wanted, found = (sorted(_FIELD.findall(text)) for text in (task.prompts[0], wording))
    if wanted == found and not _MARK.search(wording):
        return None
    return f"a wording of {task.name} has to hold {' '.join(wanted)} and no other field or mark: {wording!r}"


def render_prompt(record: Instruction, own_prompts: Sequence[str] = ()) -> str:
    """Return the user's message, one ``<image>`` mark for each of the record's images, in their order.

    Args:
        record: its ``variant`` names the wording.
        own_prompts: the user's wordings of the task, which variants from ``OWN_VARIANT`` name.

    Raises:
        DataError: unknown task, or more or fewer images or captions than the wording needs.
    """
    task = get_task(record.task, record.id)
    prompts = task.prompts
    if record.variant >= OWN_VARIANT and own_prompts:
        prompts = own_prompts
    prompt = prompts[record.variant % OWN_VARIANT % len(prompts)]
    if record.gallery_size > len(LETTERS):
        raise DataError(f"Record {record.id}: {record.gallery_size} gallery images, but there are 26 letters.")
    captions = [clean_text(caption) for caption in record.captions]
    if "{caption}" in prompt and not (len(captions) == 1 and captions[0]):
        raise DataError(f"Record {record.id}: task {task.name} needs one caption that is not empty.")
    if "{captions}" in prompt and not (2 <= len(captions) <= len(ORDINALS) and all(captions)):
        raise DataError(f"Record {record.id}: task {task.name} needs 2 to {len(ORDINALS)} captions, none empty.")
    asked = clean_text(format_attributes([a for a in record.attributes if a.image == ASKED]))
    if "{attributes}" in prompt and not asked:
        raise DataError(f"Record {record.id}: task {task.name} asks for attributes, but the record has none.")
    words = _quote(captions) if all(captions) else ""
    if "{words}" in prompt and not (words or asked):
        raise DataError(f"Record {record.id}: task {task.name} needs attributes, or captions that are not empty.")
    quoted = [f'The {name} caption: "{text}".' for name, text in zip(ORDINALS, captions, strict=False)]
    parts = {
        "{image}": IMAGE_MARK,
        "{gallery}": " ".join(f"{letter}: {IMAGE_MARK}" for letter in LETTERS[: record.gallery_size]),
        "{caption}": captions[0] if captions else "",
        "{captions}": " ".join(quoted),
        "{attributes}": asked,
        "{words}": words or asked,
    }
    # In one pass: a caption may itself hold the text "{image}".
    prompt = _FIELD.sub(lambda field: parts.get(field.group(), field.group()), prompt)
    if prompt.count(IMAGE_MARK) != len(record.images):
        raise DataError(
            f"Record {record.id}: task {task.name} asks for {prompt.count(IMAGE_MARK)} image(s), "
            f"the record has {len(record.images)}."
        )
    return prompt


def render_follow_up(record: Instruction, number: int) -> str:
    """Return the user's message of a further turn, in the task's own words; 0 is the turn after the first.

    Raises:
        DataError: the task has no such turn, or the turn lacks the detail or the image that its wording names.
    """
    task, turn = get_task(record.task, record.id), record.turns[number]
    if number >= len(task.follow_ups):
        raise DataError(
            f"Record {record.id} has {1 + len(record.turns)} turns, but task {task.name} has at most "
            f"{1 + len(task.follow_ups)}."
        )
    wordings = task.follow_ups[number]
    wording = wordings[record.variant % OWN_VARIANT % len(wordings)]
    caption = clean_text(turn.caption)
    words = _quote([caption]) if caption else clean_text(format_attributes([Attribute(ASKED, turn.name, turn.value)]))
    if not caption and not turn.name:
        raise DataError(f"Record {record.id}: turn {number + 2} adds neither a caption nor an attribute.")
    letter = ""
    if "{letter}" in wording:
        if turn.confirmed is None or not 0 <= turn.confirmed < record.gallery_size:
            raise DataError(
                f"Record {record.id}: turn {number + 2} confirms image {turn.confirmed}, which is outside the gallery "
                f"of {record.gallery_size}."
            )
        letter = LETTERS[turn.confirmed]
    parts = {"{words}": words, "{letter}": letter}
    return _FIELD.sub(lambda field: parts[field.group()], wording)


def _quote(captions: Sequence[str]) -> str:
    return " or ".join(f'"{caption}"' for caption in captions)


def format_attributes(attributes: Sequence[Attribute]) -> str:
    """Return attributes as text: ``upper colour: red, hat: none``."""
    return ", ".join(f"{a.name.replace('_', ' ')}: {a.value}" for a in attributes)

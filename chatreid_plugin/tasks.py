"""Every task in one table: its wordings and its kind of answer; training and evaluation both read it here.

Prompts are verbatim from the paper (section 3.1.1, figure 4, section 3.1.3) where the wording is the first of a
task; the others are ours. ``{image}`` stands for one image, ``{gallery}`` for the lettered gallery, ``{caption}`` and
``{captions}`` for quoted descriptions. Gallery images carry letters, since Qwen's tokenizer splits "10" into two
tokens and a letter is one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import DataError
from .records import Answer, Attribute, Instruction


AnswerKind = Literal["text", "match", "letters", "ordinal", "comparison", "attributes"]

IMAGE_MARK = "<image>"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
YES, NO = "Yes", "No"

# Qwen2-VL's chat template (its tokenizer_config.json), as LLaMA-Factory's template qwen2_vl writes it.
SYSTEM_PROMPT = "You are a helpful assistant."
CHAT_PROMPT = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class Task:
    """One task: the stage that trains it, how its answer is written, its wordings (the paper's first)."""

    name: str
    stage: int
    answer_kind: AnswerKind
    prompts: tuple[str, ...]
    answer_form: str = "{answer}"


_TASKS = (
    Task(
        "image_captioning",
        1,
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
        2,
        "match",
        (
            "Do these two images {image}{image} contain the same pedestrian identity?",
            "Is the person in the first image {image} the same as the person in the second image {image}?",
            "Compare the two pedestrians. First: {image} Second: {image} Are they one and the same person?",
        ),
    ),
    Task(
        "image_to_image_many_to_many",
        2,
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
        2,
        "match",
        (
            'Does the image {image} of the pedestrian match the following caption: "{caption}"',
            'Is this a correct description of the person in the image {image}? "{caption}"',
        ),
    ),
    Task(
        "text_to_image_many_to_one",
        2,
        "ordinal",
        (
            "Given the following image {image}, which of the captions accurately describes it? {captions}",
            "{captions} Which of these captions belongs to the image {image}?",
        ),
        "The {answer} caption",
    ),
    Task(
        "text_to_image_one_to_many",
        2,
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
        2,
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
        2,
        "attributes",
        (
            "Examine the image {image} below and select the correct attribute annotations for the pedestrian.",
            "List the attributes of the pedestrian in this image: {image}",
        ),
        "The pedestrian attributes of this image are: {answer}",
    ),
    Task(
        "standard_reid",
        3,
        "letters",
        (
            "Given the {image} provided, identify which of the following images show the same pedestrian as in the "
            "first image. {gallery}",
            "The first image {image} shows a pedestrian. Which of these images show the same pedestrian? {gallery}",
        ),
    ),
)

_FIELD = re.compile(r"\{(?:image|gallery|captions?)\}")

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
    return [task for task in _TASKS if task.stage == stage]


def format_chat_prompt(content: str) -> str:
    """Return the text that precedes the model's answer, with the user's ``content`` in it."""
    return CHAT_PROMPT.format(system=SYSTEM_PROMPT, content=content)


# What LLaMA-Factory replaces by an image, and what the tokenizer takes for a token of its own.
_MARK = re.compile(r"<(?:image|video|audio)>|<\|\w+\|>")


def _clean(text: str) -> str:
    """Remove image marks and special tokens: in a caption they would be taken for real ones."""
    # Again and again, since taking the inner mark out of "<ima<image>ge>" leaves another one.
    while _MARK.search(text):
        text = _MARK.sub("", text)
    return text.strip()


def render_prompt(record: Instruction) -> str:
    """Return the user's message, one ``<image>`` mark for each of the record's images, in their order.

    Raises:
        DataError: unknown task, or more or fewer images or captions than the wording needs.
    """
    task = get_task(record.task, record.id)
    prompt = task.prompts[record.variant % len(task.prompts)]
    if record.gallery_size > len(LETTERS):
        raise DataError(f"Record {record.id}: {record.gallery_size} gallery images, but there are 26 letters.")
    captions = [_clean(caption) for caption in record.captions]
    if "{caption}" in prompt and not (len(captions) == 1 and captions[0]):
        raise DataError(f"Record {record.id}: task {task.name} needs one caption that is not empty.")
    if "{captions}" in prompt and not (2 <= len(captions) <= len(ORDINALS) and all(captions)):
        raise DataError(f"Record {record.id}: task {task.name} needs 2 to {len(ORDINALS)} captions, none empty.")
    quoted = [f'The {name} caption: "{text}".' for name, text in zip(ORDINALS, captions, strict=False)]
    parts = {
        "{image}": IMAGE_MARK,
        "{gallery}": " ".join(f"{letter}: {IMAGE_MARK}" for letter in LETTERS[: record.gallery_size]),
        "{caption}": captions[0] if captions else "",
        "{captions}": " ".join(quoted),
    }
    # In one pass: a caption may itself hold the text "{image}".
    prompt = _FIELD.sub(lambda field: parts[field.group()], prompt)
    if prompt.count(IMAGE_MARK) != len(record.images):
        raise DataError(
            f"Record {record.id}: task {task.name} asks for {prompt.count(IMAGE_MARK)} image(s), "
            f"the record has {len(record.images)}."
        )
    return prompt


def _format_attributes(attributes: Sequence[Attribute]) -> str:
    return ", ".join(f"{a.name.replace('_', ' ')}: {a.value}" for a in attributes)


def _compare_attributes(attributes: Sequence[Attribute]) -> str:
    first = {a.name: a for a in attributes if a.image == 0}
    second = {a.name: a for a in attributes if a.image == 1}
    common = [a for name, a in first.items() if name in second and second[name].value == a.value]
    shared = {a.name for a in common}
    unique_first = [a for name, a in first.items() if name not in shared]
    unique_second = [a for name, a in second.items() if name not in shared]
    return (
        f"Common Attributes: {_format_attributes(common) or 'none'}. "
        f"Unique Attributes of the First Image: {_format_attributes(unique_first) or 'none'}. "
        f"Unique Attributes of the Second Image: {_format_attributes(unique_second) or 'none'}."
    )


def _render_choice(record: Instruction, options: Sequence[str]) -> str:
    indices = record.answer.indices
    outside = [index for index in indices if not 0 <= index < len(options)]
    if outside or not indices:
        raise DataError(
            f"Record {record.id}: answer index {outside[0] if outside else '(none)'} is outside the "
            f"{len(options)} options of the record (0 to {len(options) - 1})."
        )
    return ", ".join(options[index] for index in sorted(set(indices)))


def render_answer(record: Instruction) -> str:
    """Return the assistant's message.

    Raises:
        DataError: the record's answer does not fit its task (an index outside the gallery, a missing text, ...).
    """
    task = get_task(record.task, record.id)
    if task.answer_kind == "match":
        if record.answer.match is None:
            raise DataError(f"Record {record.id}: task {task.name} needs a yes/no answer.")
        answer = YES if record.answer.match else NO
    elif task.answer_kind == "letters":
        answer = _render_choice(record, LETTERS[: record.gallery_size])
    elif task.answer_kind == "ordinal":
        if len(set(record.answer.indices)) > 1:
            raise DataError(f"Record {record.id}: task {task.name} has one right caption, not several.")
        answer = _render_choice(record, ORDINALS[: len(record.captions)])
    elif task.answer_kind == "comparison":
        answer = _compare_attributes(record.attributes)
    elif task.answer_kind == "attributes":
        answer = _format_attributes(record.attributes)
    else:
        answer = record.answer.text or ""
    answer = _clean(answer)
    if not answer:
        raise DataError(f"Record {record.id}: task {task.name} has no answer text.")
    return task.answer_form.replace("{answer}", answer)


def read_answer(task_name: str, text: str, options: int = 0) -> Answer:
    """Read a model's reply; never raises on the text, an unreadable reply gives an empty answer.

    Args:
        task_name: a name of ``TASKS``.
        text: the reply.
        options: number of gallery images (letters) or captions (ordinals); names beyond it are ignored.
    """
    kind = get_task(task_name).answer_kind
    if kind == "match":
        found = re.search(r"\b(yes|no)\b", text.lower())
        return Answer(match=found.group() == "yes" if found else None)
    if kind == "letters":
        letters = re.findall(r"\b([A-Z])\b", text)
        return Answer(tuple(sorted({LETTERS.index(letter) for letter in letters} & set(range(options)))))
    if kind == "ordinal":
        names = re.findall(r"\b(" + "|".join(ORDINALS[:options]) + r")\b", text.lower()) if options else []
        return Answer((ORDINALS.index(names[0]),) if names else ())
    return Answer(text=text.strip())

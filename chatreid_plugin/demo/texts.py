"""Texts for the tiny model's language part: the tasks' own prompts and answers, with words in place of pixels.

Where a record has an image, the warm-up puts the words of what each cell of a crop shows (hair in the top row, shoes
in the bottom row). A decoder trained so knows the language of the tasks and can compare two descriptions, which is
what "a freshly pre-trained decoder" means for a real model.
"""

from collections.abc import Sequence

import numpy as np

from ..answers import render_answer
from ..records import Answer, Attribute, ImageReference, Instruction
from ..tasks import TASKS, format_chat_prompt, render_prompt
from .people import Person, describe_person


POSTURES = ("walking", "standing")
# Which attributes each cell of a 2 x 4 grid of visual tokens shows, row by row.
CELLS = (
    ("gender", "hair", "hat"),
    ("age", "hair", "hat"),
    ("upper_colour", "upper_type"),
    ("upper_colour", "upper_pattern", "bag"),
    ("lower_colour", "lower_type"),
    ("lower_colour", "bag"),
    ("shoes", "lower_colour"),
    ("shoes", "lower_type"),
)
# The warm-up's two phases: share of the steps, and of each task in them. Reading an image's cells comes first; a
# decoder that cannot read does not learn to compare.
PHASES = (
    (0.4, {"image_captioning": 0.7, "attribute_prediction": 0.3}),
    (
        0.6,
        {
            "image_to_image_one_to_one": 0.83,
            "image_captioning": 0.13,
            "standard_reid": 0.02,
            "attribute_comparison": 0.02,
        },
    ),
)


def write_cells(person: Person) -> list[str]:
    """Return the words of each cell of a crop of the person."""
    return [" ".join(person.attributes[name] for name in cell) for cell in CELLS]


def _draw_others(people: Sequence[Person], person: Person, count: int, rng: np.random.Generator) -> list[Person]:
    others = [people[int(i)] for i in rng.choice(len(people), size=count + 1, replace=False)]
    return [other for other in others if other is not person][:count]


def _list_attributes(people: Sequence[Person]) -> tuple[Attribute, ...]:
    return tuple(
        Attribute(position, name, value)
        for position, person in enumerate(people)
        for name, value in person.attributes.items()
    )


def draw_task(rng: np.random.Generator, progress: float) -> str:
    """Return a task's name by its weight in the phase that is on at this share of the warm-up, from 0 to 1."""
    weights = PHASES[0][1] if progress < PHASES[0][0] else PHASES[1][1]
    return list(weights)[int(rng.choice(len(weights), p=list(weights.values())))]


def draw_instruction(
    task: str, people: Sequence[Person], rng: np.random.Generator, max_gallery: int
) -> tuple[Instruction, list[Person]]:
    """Return a random record of a task and who is in its images, in order."""
    person = people[int(rng.integers(len(people)))]
    answer = Answer()
    query_images, attributes = 1, ()
    shown = [person]
    if task == "image_captioning":
        posture = POSTURES[int(rng.integers(2))]
        answer = Answer(text=describe_person(person, int(rng.integers(4)), posture))
    elif task == "image_to_image_one_to_one":
        match = bool(rng.random() < 0.5)
        shown = [person, person if match else _draw_others(people, person, 1, rng)[0]]
        answer, query_images = Answer(match=match), 2
    elif task == "standard_reid":
        size = int(rng.integers(2, max_gallery + 1))
        position = int(rng.integers(size))
        gallery = _draw_others(people, person, size - 1, rng)
        shown, answer = [person, *gallery[:position], person, *gallery[position:]], Answer((position,))
    else:
        if task == "attribute_comparison":
            shown, query_images = [person, _draw_others(people, person, 1, rng)[0]], 2
        attributes = _list_attributes(shown)
    images = tuple(ImageReference("words") for _ in shown)
    return Instruction("warm-up", task, images, query_images, answer, (), attributes), shown


def draw_text(
    task: str, people: Sequence[Person], rng: np.random.Generator, max_gallery: int = 4
) -> tuple[str, str, list[Person]]:
    """Return (prompt in chat format with ``<image>`` marks, answer, who is in the images) of a random record."""
    record, shown = draw_instruction(task, people, rng, max_gallery)
    return format_chat_prompt(render_prompt(record)), render_answer(record) + "<|im_end|>\n", shown


def list_vocabulary_texts(people: Sequence[Person], seed: int = 0) -> list[str]:
    """Return texts that hold every word of the prompts, answers and captions of one turn, for training the tokenizer.

    The demo trains no dialogue.
    """
    rng = np.random.default_rng(seed)
    asked = [task for task in TASKS.values() if not task.follow_ups]
    texts = [prompt for task in asked for prompt in (*task.prompts, task.answer_form)]
    texts += [describe_person(person, variant, POSTURES[variant % 2]) for person in people for variant in range(4)]
    texts += [" ".join(write_cells(person)) for person in people]
    return texts + [" ".join(draw_text(draw_task(rng, rng.random()), people, rng)[:2]) for _ in range(500)]

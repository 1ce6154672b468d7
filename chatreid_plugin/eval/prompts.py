"""The questions an evaluation asks, from the same task table as training (``tasks.py``); every backend asks these.

A prompt is the user's message cut at its images: ``segments[0] image segments[1] image ... segments[n]``. Query images
come first, then the candidates, as in training.
"""

from dataclasses import dataclass

from ..errors import ConfigError
from ..records import Answer, Attribute, ImageReference, Instruction
from ..tasks import ASKED, IMAGE_MARK, TASKS, format_attributes, get_task, render_prompt
from .queries import Query


IMAGE_PAIR = "image_to_image_one_to_one"
TEXT_PAIR = "text_to_image_one_to_one"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's message: ``segments`` of text with one image between each two neighbours."""

    segments: tuple[str, ...]

    @property
    def image_count(self) -> int:
        """How many images it has."""
        return len(self.segments) - 1


def describe_in_words(query: Query) -> str:
    """Return the query's words: its text, or the attributes it asks for (``upper colour: red, hat: none``)."""
    return query.text or format_attributes([Attribute(ASKED, name, value) for name, value in query.attributes.items()])


def list_pair_tasks(query: Query) -> list[str]:
    """Return the yes/no questions that can be asked of the query and one candidate: by image, by words, or both."""
    tasks = [IMAGE_PAIR] if query.image is not None else []
    return [*tasks, TEXT_PAIR] if describe_in_words(query) else tasks


def build_pair_prompt(query: Query, task: str) -> Prompt:
    """Return the yes/no question on one candidate, in the wording of the paper (the task's first).

    Args:
        query: what is searched for.
        task: ``image_to_image_one_to_one`` (images: query, candidate) or ``text_to_image_one_to_one`` (candidate).

    Raises:
        ConfigError: no yes/no task, or the query lacks what the task asks with.
    """
    if get_task(task).answer_kind != "match":
        yes_no = ", ".join(name for name, known in TASKS.items() if known.answer_kind == "match")
        raise ConfigError(f"{task} has no yes/no answer; pairs are scored with {yes_no}.")
    if task not in list_pair_tasks(query):
        raise ConfigError(f"Task {task} cannot be asked of query {query.query_id}, which has no image or no words.")
    images = 2 if task == IMAGE_PAIR else 1
    captions = () if task == IMAGE_PAIR else (describe_in_words(query),)
    return _cut(_ask(query, task, images, query_images=images, captions=captions))


def build_choice_prompt(query: Query, task: str, count: int) -> Prompt:
    """Return the question which of ``count`` lettered candidates match (images: the query's, then the candidates).

    Args:
        query: what is searched for.
        task: one whose answer names letters, e.g. ``standard_reid``.
        count: 1 to 26 candidates.

    Raises:
        ConfigError: the task's answer is no letter.
        DataError: more candidates than letters, or the query lacks what the task asks with.
    """
    if get_task(task).answer_kind != "letters":
        raise ConfigError(f"{task} does not choose among lettered images; mode: choice needs a task that does.")
    own = 1 if "{image}" in get_task(task).prompts[0] else 0
    captions = (describe_in_words(query),) if "{caption}" in get_task(task).prompts[0] else ()
    return _cut(_ask(query, task, own + count, query_images=own, captions=captions))


def _ask(query: Query, task: str, images: int, query_images: int, captions: tuple[str, ...]) -> Instruction:
    attributes = tuple(Attribute(ASKED, name, value) for name, value in query.attributes.items())
    references = (ImageReference(""),) * images
    return Instruction(query.query_id, task, references, query_images, Answer(), captions, attributes)


def _cut(record: Instruction) -> Prompt:
    return Prompt(tuple(render_prompt(record).split(IMAGE_MARK)))

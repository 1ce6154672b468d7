"""The questions an evaluation asks, from the same task table as training (``tasks.py``); every backend asks these.

A prompt is the user's message cut at its images: ``segments[0] image segments[1] image ... segments[n]``. Query images
come first, then the candidates, as in training.
"""

from dataclasses import dataclass

from ..errors import ConfigError
from ..records import Answer, Attribute, ImageReference, Instruction
from ..tasks import ASKED, IMAGE_MARK, format_attributes, get_task, render_prompt
from .queries import Query


# What a pair of query and candidate is asked with. Stage 3 trains all four, so that nothing untrained is asked.
IMAGE_PAIR = "image_to_image_one_to_one"
TEXT_PAIR = "text_to_image_one_to_one"
ATTRIBUTE_PAIR = "attribute_one_to_one"
MULTIMODAL_PAIR = "multimodal_one_to_one"
PAIR_TASKS = (IMAGE_PAIR, TEXT_PAIR, ATTRIBUTE_PAIR, MULTIMODAL_PAIR)
SHOWS_QUERY = (IMAGE_PAIR, MULTIMODAL_PAIR)


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


def can_ask(query: Query, task: str) -> bool:
    """Return whether a query has what a yes/no task asks with."""
    needs = {
        IMAGE_PAIR: query.image is not None,
        TEXT_PAIR: bool(query.text),
        ATTRIBUTE_PAIR: bool(query.attributes),
        MULTIMODAL_PAIR: query.image is not None and bool(query.text),
    }
    return needs.get(task, False)


def list_pair_tasks(query: Query, separately: bool = False) -> list[str]:
    """Return the yes/no questions that are asked of the query and one candidate; several are combined.

    Args:
        query: what is searched for.
        separately: ask about an image and its text in two questions instead of one. Attributes beside an image are
            always a question of their own: the words of a multimodal question are sentences in training.
    """
    if can_ask(query, MULTIMODAL_PAIR) and not separately:
        return [MULTIMODAL_PAIR]
    words = TEXT_PAIR if query.text else ATTRIBUTE_PAIR
    return [task for task in (IMAGE_PAIR, words) if can_ask(query, task)]


def build_pair_prompt(query: Query, task: str) -> Prompt:
    """Return the yes/no question on one candidate, in the wording of the paper (the task's first).

    Args:
        query: what is searched for.
        task: one of ``PAIR_TASKS``; those of ``SHOWS_QUERY`` have two images, the query's and the candidate's.

    Raises:
        ConfigError: no yes/no task, or the query lacks what the task asks with.
    """
    if get_task(task).answer_kind != "match":
        raise ConfigError(f"{task} has no yes/no answer; pairs are scored with {', '.join(PAIR_TASKS)}.")
    if not can_ask(query, task):
        raise ConfigError(f"Task {task} cannot be asked of query {query.query_id}, which lacks an image or the words.")
    images = 2 if task in SHOWS_QUERY else 1
    captions = (query.text,) if task in (TEXT_PAIR, MULTIMODAL_PAIR) else ()
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

"""The other half of a task: the right answer as text, and a model's reply read back."""

import re
from collections.abc import Sequence
from dataclasses import replace

import xxhash

from .errors import DataError
from .records import Answer, Attribute, Instruction
from .tasks import (
    LETTER_KINDS,
    LETTERS,
    NO,
    ORDINALS,
    YES,
    clean_text,
    format_attributes,
    get_task,
    render_follow_up,
    render_prompt,
)


def _compare_attributes(attributes: Sequence[Attribute]) -> str:
    first = {a.name: a for a in attributes if a.image == 0}
    second = {a.name: a for a in attributes if a.image == 1}
    common = [a for name, a in first.items() if name in second and second[name].value == a.value]
    shared = {a.name for a in common}
    unique_first = [a for name, a in first.items() if name not in shared]
    unique_second = [a for name, a in second.items() if name not in shared]
    return (
        f"Common Attributes: {format_attributes(common) or 'none'}. "
        f"Unique Attributes of the First Image: {format_attributes(unique_first) or 'none'}. "
        f"Unique Attributes of the Second Image: {format_attributes(unique_second) or 'none'}."
    )


def _render_choice(record: Instruction, options: Sequence[str]) -> str:
    indices = record.answer.indices
    outside = [index for index in indices if not 0 <= index < len(options)]
    if outside or not indices:
        raise DataError(
            f"Record {record.id}: answer index {outside[0] if outside else '(none)'} is outside the "
            f"{len(options)} options of the record (0 to {len(options) - 1})."
        )
    return ", ".join(options[index] for index in order_answers(record.id, indices))


def order_answers(record_id: str, indices: Sequence[int]) -> list[int]:
    """Return the right answers of a record, each once, in an order drawn from its id.

    Sorted, the first letter of an answer would always be the alphabetically first match: a model that learnt this
    perfectly gives the other matches nothing, and ``mode: choice``, which reads the first letter's probabilities,
    would rank them as misses. In random order each match is first equally often.
    """
    return sorted(set(indices), key=lambda index: xxhash.xxh3_64_intdigest(f"{record_id}/{index}".encode()))


def render_turns(record: Instruction, own_prompts: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return the messages of a record, the user's and the assistant's of each turn; most tasks have one turn.

    Args:
        record: what is asked and what is right.
        own_prompts: the user's wordings of the task; of a dialogue, of its first turn.

    Raises:
        DataError: the record does not fit its task.
    """
    turns = [(render_prompt(record, own_prompts), render_answer(record))]
    for number, turn in enumerate(record.turns):
        # An id of its own, so that the order of the letters is drawn anew.
        asked = replace(record, id=f"{record.id}/{number + 2}", answer=Answer(turn.indices))
        turns.append((render_follow_up(record, number), render_answer(asked)))
    return turns


def render_answer(record: Instruction) -> str:
    """Return the assistant's message; of a dialogue, its first.

    Raises:
        DataError: the record's answer does not fit its task (an index outside the gallery, a missing text, ...).
    """
    task = get_task(record.task, record.id)
    if task.answer_kind == "match":
        if record.answer.match is None:
            raise DataError(f"Record {record.id}: task {task.name} needs a yes/no answer.")
        answer = YES if record.answer.match else NO
    elif task.answer_kind in LETTER_KINDS:
        answer = _render_choice(record, LETTERS[: record.gallery_size])
    elif task.answer_kind == "ordinal":
        if len(set(record.answer.indices)) > 1:
            raise DataError(f"Record {record.id}: task {task.name} has one right caption, not several.")
        answer = _render_choice(record, ORDINALS[: len(record.captions)])
    elif task.answer_kind == "comparison":
        answer = _compare_attributes(record.attributes)
    elif task.answer_kind == "attributes":
        answer = format_attributes(record.attributes)
    else:
        answer = record.answer.text or ""
    answer = clean_text(answer)
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
    if kind in LETTER_KINDS:
        letters = re.findall(r"\b([A-Z])\b", text)
        return Answer(tuple(sorted({LETTERS.index(letter) for letter in letters} & set(range(options)))))
    if kind == "ordinal":
        names = re.findall(r"\b(" + "|".join(ORDINALS[:options]) + r")\b", text.lower()) if options else []
        return Answer((ORDINALS.index(names[0]),) if names else ())
    return Answer(text=text.strip())

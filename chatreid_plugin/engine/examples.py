"""Examples of built data sets, as ``chatreid show`` prints them: images, prompt and answer of single records."""

import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..answers import render_turns
from ..images import ImagePolicy, count_visual_tokens
from ..records import ImageReference, Instruction
from ..tasks import LETTERS, ORDINALS
from .built_datasets import BuiltDataset, list_datasets, read_records


# Examples of a task that is named; of all tasks, one each.
DEFAULT_COUNT = 3
# Longer lines are hard to read, however wide the terminal.
WIDEST_LINE = 119


@dataclass(frozen=True, slots=True)
class ExampleImage:
    """One image of an example.

    Attributes:
        label: ``query``, an ordinal (first, second) or the gallery letter.
        path: relative to the image root, as recorded.
        file: where it should lie.
        found: whether it lies there.
        width: pixels, 0 if unknown.
        height: pixels, 0 if unknown.
        tokens: visual tokens under the stage's policy; None if the size is unknown.
        right: whether a gallery image belongs to the answer; None outside the gallery.
    """

    label: str
    path: str
    file: str
    found: bool
    width: int
    height: int
    tokens: int | None
    right: bool | None


@dataclass(frozen=True, slots=True)
class ExampleCaption:
    """One caption that the prompt quotes; ``right`` says of several which is the answer."""

    text: str
    right: bool | None


@dataclass(frozen=True, slots=True)
class ExampleTurn:
    """A further turn of a dialogue: the user's and the assistant's message."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Example:
    """One record as a person reads it.

    Attributes:
        dataset: name of the built data set.
        task: its task.
        stage: the stage that trains it.
        number: position in the data set, from 0.
        records: how many the data set has.
        id: of the record.
        source: the data set that the query comes from.
        variant: which wording of the prompt; 0 is the paper's.
        images: query first, then the gallery.
        captions: those that the prompt quotes.
        prompt: the user's message, with ``<image>`` marks; of a dialogue, the first.
        answer: the assistant's message.
        turns: of a dialogue, what follows.
    """

    dataset: str
    task: str
    stage: int
    number: int
    records: int
    id: str
    source: str
    variant: int
    images: tuple[ExampleImage, ...]
    captions: tuple[ExampleCaption, ...]
    prompt: str
    answer: str
    turns: tuple[ExampleTurn, ...] = ()


def list_examples(dataset_dir: Path, wanted: str | None, start: int, count: int | None) -> list[Example]:
    """Return examples of built data sets.

    Args:
        dataset_dir: the ``output_dir`` of ``chatreid build``.
        wanted: a data set or task; all if None.
        start: number of the first record, from 0.
        count: records of each data set; three of one that is named and one of each otherwise if None.

    Raises:
        DataError: no such folder, data set or record, or a record that does not fit its task.
    """
    if count is None:
        count = 1 if wanted is None else DEFAULT_COUNT
    return [
        build_example(dataset, start + offset, record)
        for dataset in list_datasets(dataset_dir, wanted)
        for offset, record in enumerate(read_records(dataset, start, count))
    ]


def build_example(dataset: BuiltDataset, number: int, record: Instruction) -> Example:
    """Return a record as a person reads it.

    Raises:
        DataError: the record does not fit its task.
    """
    task = dataset.task
    (prompt, answer), *turns = render_turns(record, dataset.own_prompts)
    return Example(
        dataset=dataset.name,
        task=task.name,
        stage=dataset.stage,
        number=number,
        records=dataset.records,
        id=record.id,
        source=record.dataset,
        variant=record.variant,
        images=tuple(_describe_image(record, position, dataset) for position in range(len(record.images))),
        captions=tuple(
            ExampleCaption(text, position in record.answer.indices if task.answer_kind == "ordinal" else None)
            for position, text in enumerate(record.captions)
        ),
        prompt=prompt,
        answer=answer,
        turns=tuple(ExampleTurn(*turn) for turn in turns),
    )


def _describe_image(record: Instruction, position: int, dataset: BuiltDataset) -> ExampleImage:
    image = record.images[position]
    place = position - record.query_images
    if place >= 0:
        label, right = LETTERS[place], place in record.answer.indices
    else:
        label, right = ("query" if record.query_images == 1 else ORDINALS[position]), None
    file = dataset.image_root / image.path
    tokens = _count_tokens(image, dataset.stage)
    return ExampleImage(label, image.path, str(file), file.is_file(), image.width, image.height, tokens, right)


def _count_tokens(image: ImageReference, stage: int) -> int | None:
    if not (image.width and image.height):
        return None
    return count_visual_tokens(image.width, image.height, ImagePolicy(stage))


def render_json(examples: Sequence[Example]) -> str:
    """Return the examples as a JSON list."""
    return json.dumps([asdict(example) for example in examples], indent=2, ensure_ascii=False)


def render_text(examples: Sequence[Example]) -> str:
    """Return the examples as text, wrapped to the terminal's width."""
    width = min(shutil.get_terminal_size().columns, WIDEST_LINE)
    return "\n\n".join(_render_example(example, width) for example in examples)


def _render_example(example: Example, width: int) -> str:
    title = f"{example.dataset}, record {example.number:,} of {example.records:,}"
    facts = f"{example.id} (Stage {example.stage}, wording {example.variant}, from {example.source or 'unknown'})"
    lines = [title, "-" * min(len(title), width), f"id      {facts}"]
    lines += [f"{'images' if i == 0 else '':<8}{_render_image(image)}" for i, image in enumerate(example.images)]
    counted = sum(image.tokens or 0 for image in example.images)
    lines.append(f"tokens  {counted:,} of {len(example.images)} image(s) under Stage {example.stage}'s policy")
    for turn in (example, *example.turns):
        lines += _wrap("prompt", turn.prompt, width) + _wrap("answer", turn.answer, width)
    return "\n".join(lines)


def _render_image(image: ExampleImage) -> str:
    size = f"{image.width} x {image.height}, {image.tokens} tokens" if image.tokens else "size unknown"
    mark = " ✓" if image.right else ""
    return f"{image.label:<7}{image.path} ({size}){mark}{'' if image.found else ' FILE MISSING'}"


def _wrap(name: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=f"{name:<8}", subsequent_indent=" " * 8, break_long_words=False)

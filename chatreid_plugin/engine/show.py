"""``chatreid show``: records of built data sets as a person reads them, as text, JSON or one HTML file.

First, built data sets as they lie on disk: ``dataset_info.json`` names them, the footers of the shards count their
records, and ``<name>.json`` beside each folder holds the recipe; any record is read without reading whole shards
(``stats.py`` begins here, too). Then single records with their images, prompt and answer.
"""

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..answers import render_turns
from ..config import BuildSettings
from ..errors import DataError
from ..html import render_template
from ..images import ImagePolicy, count_visual_tokens
from ..pixels import encode_thumbnail
from ..records import ImageReference, Instruction, convert_row_to_instruction
from ..shards import DATASET_INFO, FORMATTING, HELD_OUT, check_shard, open_parquet, read_json, write_text
from ..tasks import IMAGE_MARK, LETTERS, ORDINALS, Task, get_task


TEMPLATE = Path(__file__).with_name("show.html.j2")
# Examples of a task that is named; of all tasks, one each.
DEFAULT_COUNT = 3
# Longer lines are hard to read, however wide the terminal.
WIDEST_LINE = 119


# ---- Built data sets on disk ----


@dataclass(frozen=True, slots=True)
class BuiltDataset:
    """One data set of ``dataset_info.json``.

    Attributes:
        name: as in ``dataset_info.json``.
        task: of all its records.
        stage: the one that trains it.
        image_root: the folder that the records' image paths are relative to.
        shards: its Parquet files in reading order.
        sizes: records of each shard.
        provenance: the JSON file that ``build`` writes beside the folder.
        own_prompts: the user's wordings of the task.
    """

    name: str
    task: Task
    stage: int
    image_root: Path
    shards: tuple[Path, ...]
    sizes: tuple[int, ...]
    provenance: Path
    own_prompts: tuple[str, ...] = ()

    @property
    def held_out(self) -> bool:
        """Whether its identities train no record."""
        return self.name.endswith(HELD_OUT)

    @property
    def records(self) -> int:
        """Number of records in all shards."""
        return sum(self.sizes)


def _read_entries(dataset_dir: Path) -> dict[str, Any]:
    """Return the data sets of our format that ``dataset_info.json`` names."""
    path = dataset_dir / DATASET_INFO
    if not path.is_file():
        raise DataError(
            f"{dataset_dir} is no folder of built data sets: it has no {DATASET_INFO}. Name the output_dir of "
            "`chatreid build`."
        )
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise DataError(f"{path} is not a JSON object of data sets. Build them with `chatreid build`.")
    return {name: e for name, e in entries.items() if isinstance(e, dict) and e.get("formatting") == FORMATTING}


def _open_dataset(dataset_dir: Path, name: str, entry: dict[str, Any]) -> BuiltDataset | None:
    """Return a data set, or None if nothing of it is there."""
    try:
        folder = dataset_dir / entry.get("file_name", name)
        block = entry.get("chatreid") or {}
        root = (dataset_dir.resolve() / block.get("image_root", "")).resolve()
        own_prompts = tuple(map(str, block.get("prompts", ())))
        stage = None if block.get("stage") is None else int(block["stage"])
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"{dataset_dir / DATASET_INFO}: the entry {name} is damaged ({error}). Build it with `chatreid build`."
        ) from None
    shards = tuple(sorted(folder.glob("*.parquet")))
    sizes = tuple(check_shard(shard) for shard in shards)
    filled = next((shard for shard, size in zip(shards, sizes, strict=True) if size), None)
    if filled is None:
        return None
    (first,) = _read_rows(filled, 0, 1)
    task = get_task(first.task, first.id)
    # Data sets of earlier versions do not say it; theirs is the task's first.
    stage = task.stages[0] if stage is None else stage
    return BuiltDataset(name, task, stage, root, shards, sizes, dataset_dir / f"{name}.json", own_prompts)


def list_datasets(dataset_dir: Path, wanted: str | None = None) -> list[BuiltDataset]:
    """Return the data sets of a folder that have records, in the order of ``dataset_info.json``.

    Args:
        dataset_dir: the ``output_dir`` of ``chatreid build``, LLaMA-Factory's ``dataset_dir``.
        wanted: only those of this name or task.

    Raises:
        DataError: the folder holds no built data set, none of this name or task, or a damaged one.
    """
    opened = (_open_dataset(dataset_dir, name, entry) for name, entry in _read_entries(dataset_dir).items())
    datasets = [dataset for dataset in opened if dataset is not None]
    if not datasets:
        raise DataError(f"{dataset_dir} holds no built data set. Build some with `chatreid build`.")
    found = [dataset for dataset in datasets if wanted in (None, dataset.name, dataset.task.name)]
    if not found:
        known = ", ".join(dataset.name for dataset in datasets)
        raise DataError(f"{dataset_dir} holds no data set or task {wanted!r}; there are: {known}.")
    return found


def read_build_settings(dataset: BuiltDataset) -> BuildSettings:
    """Return the recipe that a data set was built from.

    Raises:
        DataError: there is no provenance, it is not one that this version can read, or the build has not ended.
    """
    provenance = read_json(dataset.provenance)
    try:
        settings, complete = BuildSettings.model_validate(provenance["settings"]), provenance["complete"]
    except (TypeError, KeyError, ValidationError) as error:
        raise DataError(
            f"{dataset.provenance} holds no recipe that this version understands ({error}). "
            "Build the data set again with `chatreid build`."
        ) from None
    if not complete:
        raise DataError(
            f"{dataset.provenance}: the data set is not complete. Run `chatreid build` again to finish it."
        )
    return settings


def read_records(dataset: BuiltDataset, start: int, count: int) -> list[Instruction]:
    """Return up to ``count`` records from number ``start`` (0-based); only their row groups are read.

    Raises:
        DataError: the data set has no record of this number, or a shard is damaged.
    """
    if not 0 <= start < dataset.records:
        raise DataError(
            f"{dataset.name} has no record number {start}: it has {dataset.records:,} (0 to {dataset.records - 1})."
        )
    records: list[Instruction] = []
    for shard, first, last in _list_ranges(dataset.sizes, start, start + count):
        records += _read_rows(dataset.shards[shard], first, last)
    return records


def _list_ranges(sizes: tuple[int, ...], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (part, first row, row after the last one) of each part that overlaps rows ``start`` to ``end``."""
    offsets = [0, *accumulate(sizes)]
    for part, size in enumerate(sizes):
        first, last = max(start - offsets[part], 0), min(end - offsets[part], size)
        if first < last:
            yield part, first, last


def _read_rows(path: Path, first: int, last: int) -> list[Instruction]:
    rows: list[dict[str, Any]] = []
    with open_parquet(path) as file:
        groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))
        for group, begin, end in _list_ranges(groups, first, last):
            rows += file.read_row_group(group).slice(begin, end - begin).to_pylist()
    return [convert_row_to_instruction(row) for row in rows]


# ---- Records as a person reads them ----


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


# ---- The page ----


def _view_example(example: Example) -> dict[str, Any]:
    images = [{"picture": encode_thumbnail(Path(image.file)), "facts": image} for image in example.images]
    queries = sum(image.right is None for image in example.images)
    return {
        "example": example,
        "query": images[:queries],
        "gallery": images[queries:],
        # One piece more than there are images: the mark between two pieces stands for an image.
        "prompt": example.prompt.split(IMAGE_MARK),
    }


def render_page(examples: Sequence[Example]) -> str:
    """Return the HTML of the page; every text from outside is escaped."""
    views = [_view_example(example) for example in examples]
    return render_template(TEMPLATE, views=views)


def write_page(path: Path, examples: Sequence[Example]) -> None:
    """Write the page, atomically."""
    write_text(path, render_page(examples))

"""One streaming pass over the shards of a built data set: what its records hold, counted column by column.

First step of ``chatreid stats``. No Python object is made per record, so that millions take minutes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from ...errors import DataError
from ...images import ImagePolicy, count_visual_tokens
from ...records import list_missing_columns
from ...shards import open_parquet
from ...tasks import Task
from ..arrow_compute import pc
from ..built_datasets import BuiltDataset


IntArray = npt.NDArray[np.int64]


BATCH_RECORDS = 65536
# Qwen2-VL's chat frame with the default system prompt, the marks that end both turns included.
FRAME_TOKENS = 21
# <|vision_start|> and <|vision_end|> around each image, and the letter before it.
TOKENS_AROUND_IMAGE = 5
# English takes about 4.5 characters a token; fewer here, as when records are built: no text is to be underestimated.
CHARACTERS_PER_TOKEN = 3
# ``The second caption: "". `` around a caption; ``: `` and ``, `` around an attribute; ``, `` after a letter.
CHARACTERS_AROUND_CAPTION = 24
CHARACTERS_AROUND_ATTRIBUTE = 4
CHARACTERS_PER_LETTER = 3
# What ends a turn and begins the next: eleven tokens at three characters each.
CHARACTERS_AROUND_TURN = 33


def _make_counts() -> IntArray:
    return np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class DatasetCounts:
    """What the records of a data set hold; the arrays give the number of records by value.

    Attributes:
        records: how many were counted.
        gallery_sizes: by number of gallery images N.
        matches: by number of right answers n; every record without a gallery or captions to choose from has 0.
        visual_tokens: by the visual tokens of all images, exact under the stage's policy.
        tokens: by all tokens of the sequence, those of the text estimated.
        variants: by wording of the prompt.
        turns: by number of questions; 1 but in dialogues.
        right: yes/no answers that are yes.
        wrong: yes/no answers that are no.
        unknown_sizes: images without width and height, counted as 0 tokens.
        sources: by name of the data set that the query comes from.
    """

    records: int = 0
    gallery_sizes: IntArray = field(default_factory=_make_counts)
    matches: IntArray = field(default_factory=_make_counts)
    visual_tokens: IntArray = field(default_factory=_make_counts)
    tokens: IntArray = field(default_factory=_make_counts)
    variants: IntArray = field(default_factory=_make_counts)
    turns: IntArray = field(default_factory=_make_counts)
    right: int = 0
    wrong: int = 0
    unknown_sizes: int = 0
    sources: dict[str, int] = field(default_factory=dict[str, int])


def count_datasets(datasets: Sequence[BuiltDataset]) -> list[DatasetCounts]:
    """Read the shards of all data sets once and return what each holds.

    Raises:
        DataError: a shard is damaged, lacks a column or holds records of another task.
    """
    every: list[DatasetCounts] = []
    with tqdm(total=sum(dataset.records for dataset in datasets), desc="statistics", unit="record") as progress:
        for dataset in datasets:
            counts = DatasetCounts()
            for shard in dataset.shards:
                for batch in _read_batches(shard):
                    _count_batch(counts, batch, dataset, shard)
                    progress.update(len(batch))
            every.append(counts)
    return every


def _read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the columns that are counted; ids and image paths, more than half of all bytes, stay unread."""
    with open_parquet(path) as file:
        missing = list_missing_columns(file.schema_arrow.names)
        if missing:
            raise DataError(f"{path} lacks column(s) {', '.join(missing)}. Build it with `chatreid build`.")
        leaves = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
        wanted = [
            leaf for leaf in leaves if leaf != "id" and not (leaf.startswith("images.") and leaf.endswith(".path"))
        ]
        yield from file.iter_batches(BATCH_RECORDS, columns=wanted)


def _count_batch(counts: DatasetCounts, batch: pa.RecordBatch, dataset: BuiltDataset, shard: Path) -> None:
    task = dataset.task
    others = [name for name in pc.unique(batch["task"]).to_pylist() if name != task.name]
    if others:
        raise DataError(f"{shard} mixes tasks {task.name} and {others[0]}; a data set has one. Build it again.")
    images = _measure_lists(batch["images"])
    galleries = images - _read_integers(batch["query_images"])
    if galleries.min(initial=0) < 0:
        raise DataError(f"{shard} has a record with fewer images than query_images. Build it again.")
    answer = batch["answer"]
    matches = _measure_lists(pc.struct_field(answer, "indices"))
    variants = _read_integers(batch["variant"])
    visual = _count_visual_tokens(counts, batch["images"], images, dataset.stage)
    further = _measure_lists(batch["turns"]) if "turns" in batch.schema.names else np.zeros(len(batch), dtype=np.int64)
    characters = _count_characters(batch, task, variants, matches)
    if further.any():
        characters += _count_further_characters(batch["turns"], task, further)
    text = characters // CHARACTERS_PER_TOKEN + 1
    counts.records += len(batch)
    counts.gallery_sizes = _add(counts.gallery_sizes, galleries)
    counts.matches = _add(counts.matches, matches)
    counts.visual_tokens = _add(counts.visual_tokens, visual)
    counts.tokens = _add(counts.tokens, visual + TOKENS_AROUND_IMAGE * images + text + FRAME_TOKENS)
    counts.variants = _add(counts.variants, variants)
    counts.turns = _add(counts.turns, further + 1)
    match = pc.struct_field(answer, "match")
    right = pc.sum(match).as_py() or 0
    counts.right += right
    counts.wrong += len(match) - match.null_count - right
    for item in pc.value_counts(batch["dataset"]).to_pylist():
        name = item["values"] or "unknown"
        counts.sources[name] = counts.sources.get(name, 0) + item["counts"]


def _add(counts: IntArray, values: IntArray) -> IntArray:
    more = np.bincount(values, minlength=len(counts))
    more[: len(counts)] += counts
    return more


def _read_integers(array: pa.Array) -> IntArray:
    return pc.fill_null(array, 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _measure_lists(lists: pa.Array) -> IntArray:
    """Return the number of items of each list, 0 for none."""
    return _read_integers(pc.list_value_length(lists))


def _sum_lists(values: IntArray, lengths: IntArray) -> IntArray:
    """Return the sum of each list's values; ``lengths`` says how many of the flat ``values`` each list has."""
    sums = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(lengths)
    return sums[ends] - sums[ends - lengths]


@lru_cache(maxsize=1 << 20)
def _count_image_tokens(width: int, height: int, stage: int) -> int:
    return count_visual_tokens(width, height, ImagePolicy(stage)) if width > 0 and height > 0 else 0


def _count_visual_tokens(counts: DatasetCounts, images: pa.Array, lengths: IntArray, stage: int) -> IntArray:
    """Return the visual tokens of each record; every size is looked up once a batch."""
    flat = images.flatten()
    widths, heights = (_read_integers(pc.struct_field(flat, name)) for name in ("width", "height"))
    sizes = pc.dictionary_encode(pa.array(widths << 32 | heights))
    known = [_count_image_tokens(size >> 32, size & 0xFFFFFFFF, stage) for size in sizes.dictionary.to_pylist()]
    counts.unknown_sizes += int(np.count_nonzero((widths <= 0) | (heights <= 0)))
    tokens = np.array(known, dtype=np.int64)[sizes.indices.to_numpy()]
    return _sum_lists(tokens, lengths)


def _count_characters(batch: pa.RecordBatch, task: Task, variants: IntArray, matches: IntArray) -> IntArray:
    """Return the characters of each record's prompt and answer, the wording's field names included."""
    wordings = np.array([len(prompt) for prompt in task.prompts], dtype=np.int64)
    characters = wordings[variants % len(wordings)] + len(task.answer_form) + CHARACTERS_PER_LETTER * matches
    characters += _read_integers(pc.utf8_length(pc.struct_field(batch["answer"], "text")))
    captions = batch["captions"]
    lengths = _read_integers(pc.utf8_length(captions.flatten())) + CHARACTERS_AROUND_CAPTION
    characters += _sum_lists(lengths, _measure_lists(captions))
    attributes = batch["attributes"]
    flat = attributes.flatten()
    names, values = (_read_integers(pc.utf8_length(pc.struct_field(flat, name))) for name in ("name", "value"))
    lengths = names + values
    return characters + _sum_lists(lengths + CHARACTERS_AROUND_ATTRIBUTE, _measure_lists(attributes))


def _count_further_characters(turns: pa.Array, task: Task, lengths: IntArray) -> IntArray:
    """Return the characters of each record's turns after the first, each with its longest wording."""
    flat = turns.flatten()
    texts = (_read_integers(pc.utf8_length(pc.struct_field(flat, name))) for name in ("caption", "name", "value"))
    characters = sum(texts, CHARACTERS_PER_LETTER * _measure_lists(pc.struct_field(flat, "indices")))
    longest = max((len(wording) for wordings in task.follow_ups for wording in wordings), default=0)
    return _sum_lists(characters + longest + CHARACTERS_AROUND_ATTRIBUTE + CHARACTERS_AROUND_TURN, lengths)

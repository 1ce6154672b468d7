"""The cutoff guard: a record over ``cutoff_len`` loses whole gallery images or is refused, never a part of an image.

Stock LLaMA-Factory cuts the token ids: image tokens without their image stop the model steps later with a shape
mismatch, and a cut answer is learnt as it is.

``chatreid_trimmed.txt`` in the output folder has a line for each record that lost images: record id, tab, images left
out. Several processes write it: data loader workers in lazy mode, mapping processes in the eager one.
"""

import copy
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import xxhash
from transformers import TrainerCallback

from .. import __version__
from ..answers import render_turns
from ..errors import DataError
from ..printing import say
from ..records import Answer, Instruction, convert_row_to_instruction
from ..tasks import LETTER_KINDS, get_task
from .compat import get_function


OVER_CUTOFF = ("trim", "raise")
# The record as its shard has it, and the user's wordings: what trimming starts from. Null in rows of other data sets.
ROW_COLUMN = "_chatreid_row"
OWN_PROMPTS = "own_prompts"
LIST_NAME = "chatreid_trimmed.txt"
# The environment reaches data loader workers and mapping processes, forked or spawned; as a field of the guard the
# path would be a part of the key of datasets' map cache.
LIST_VARIABLE = "CHATREID_TRIMMED_LIST"
# A few megabytes; the tasks, their wordings and 26 gallery sizes make some hundred texts without captions.
REMEMBERED_TEXTS = 2048
PACKAGE = Path(__file__).parents[1]


@cache
def find_code_version(package: Path = PACKAGE) -> str:
    """Return the plugin's version and a hash of its source, for keys of ``datasets``' map cache.

    ``datasets`` names a map's result after the mapped object's fields, not after the code behind it: a function edited
    in place would be served the tokens of the one before.

    Args:
        package: the package's folder.
    """
    digest = xxhash.xxh3_64()
    for file in sorted([*package.glob("*.py"), *package.glob("training/*.py")]):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return f"{__version__}+{digest.hexdigest()}"


def make_messages(record: Instruction, own_prompts: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """Return the conversation as LLaMA-Factory takes it: ``_response`` is the last answer, ``_prompt`` all before it.

    The loss is on every answer, unless the recipe sets ``mask_history``.
    """
    messages = [
        {"role": role, "content": content}
        for turn in render_turns(record, own_prompts)
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    return {"_prompt": messages[:-1], "_response": messages[-1:]}


def drop_distractor(record: Instruction) -> tuple[Instruction, int] | None:
    """Leave out the last gallery image that is no match in any turn; later images get the letters before theirs.

    Returns:
        The record without the image, and the image's position among ``images``; None if the record has no lettered
        gallery, or one with a single image that is no match: without it, the question would answer itself.
    """
    if get_task(record.task, record.id).answer_kind not in LETTER_KINDS:
        return None
    matches = set(record.answer.indices).union(*(turn.indices for turn in record.turns))
    matches.update(turn.confirmed for turn in record.turns if turn.confirmed is not None)
    distractors = [index for index in range(record.gallery_size) if index not in matches]
    if len(distractors) < 2:
        return None
    dropped = distractors[-1]
    position = record.query_images + dropped

    def move(indices: Sequence[int]) -> tuple[int, ...]:
        return tuple(index - (index > dropped) for index in indices)

    trimmed = replace(
        record,
        images=record.images[:position] + record.images[position + 1 :],
        answer=Answer(move(record.answer.indices)),
        attributes=tuple(
            replace(a, image=a.image - (a.image > position)) for a in record.attributes if a.image != position
        ),
        turns=tuple(
            replace(
                turn,
                indices=move(turn.indices),
                confirmed=None if turn.confirmed is None else move([turn.confirmed])[0],
            )
            for turn in record.turns
        ),
    )
    return trimmed, position


class RememberingTokenizer:
    """A tokenizer that remembers the ids of the texts it has met last; everything else is the tokenizer's own.

    The system prompt, a wording with its image marks and an answer come again: records of one wording and gallery size
    differ in their images alone, and images are single tokens while the text is tokenized.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._encode = lru_cache(REMEMBERED_TEXTS)(self._encode_anew)

    def _encode_anew(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return a text's token ids, as the tokenizer's method does."""
        return list(self._encode(text, add_special_tokens))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __reduce__(self) -> tuple[type["RememberingTokenizer"], tuple[Any]]:
        # Without the memory: it is no part of the key of datasets' map cache, nor of what a worker is sent.
        return RememberingTokenizer, (self.tokenizer,)


@dataclass
class CutoffGuard:
    """LLaMA-Factory's dataset processor of supervised training or generation, kept from cutting ChatReID records.

    Attributes:
        processor: LLaMA-Factory's.
        uncut: the same, but it neither packs nor cuts, and writes one image token for each image. The guard repeats
            the tokens: a tokenizer that has to find hundreds of them in a text takes most of its time for that.
        over_cutoff: ``trim`` or ``raise``.
        generate: prompt and answer are apart, as for ``predict_with_generate``.
    """

    processor: Any
    uncut: Any
    over_cutoff: str
    generate: bool

    def __post_init__(self) -> None:
        self.version = find_code_version()  # for the key of datasets' map cache

    def preprocess_dataset(self, examples: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the processor's columns for a batch of aligned records.

        Raises:
            DataError: a record is too long, and cannot or must not be trimmed.
        """
        columns = {name: values for name, values in examples.items() if name != ROW_COLUMN}
        compact: Sequence[Any] = examples.get(ROW_COLUMN) or [None] * len(columns["_prompt"])
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        encoded: list[Mapping[str, list[Any]]] = []
        for index, (row, source) in enumerate(zip(rows, compact, strict=True)):
            if source is None:  # another data set in the mixture: LLaMA-Factory's to cut
                encoded.append(self.processor.preprocess_dataset({name: [value] for name, value in row.items()}))
            else:
                rows[index], result = self._fit(row, source)
                encoded.append(result)
        if self.processor.data_args.packing and not self.generate:
            return self.processor.preprocess_dataset({name: [row[name] for row in rows] for name in columns})
        names = dict.fromkeys(name for result in encoded for name in result)
        return {name: [value for result in encoded for value in result.get(name, ())] for name in names}

    def _fit(self, row: dict[str, Any], source: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, list[Any]]]:
        """Return an aligned record that fits, trimmed if need be, and its columns."""
        cutoff = self.processor.data_args.cutoff_len
        result, length = self._encode(row)
        if length <= cutoff:
            return row, result
        record = convert_row_to_instruction(source)
        fitted, images = row, list(row["_images"])
        while length > cutoff:
            smaller = drop_distractor(record) if self.over_cutoff == "trim" else None
            if smaller is None:
                raise DataError(_explain(record, length, cutoff, len(row["_images"]) - len(images), self.over_cutoff))
            record, position = smaller
            del images[position]
            fitted = row | make_messages(record, source[OWN_PROMPTS]) | {"_images": images}
            result, length = self._encode(fitted)
        note_trimmed(record.id, len(row["_images"]) - len(images))
        return fitted, result

    def _encode(self, row: Mapping[str, Any]) -> tuple[Mapping[str, list[Any]], int]:
        """Return the columns of an aligned record, uncut, and its length in tokens."""
        result = self.uncut.preprocess_dataset({name: [value] for name, value in row.items()})
        ids, labels = result["input_ids"][0], result["labels"][0]
        plugin, processor = self.processor.template.mm_plugin, self.processor.processor
        grids = plugin._get_mm_token_metadata(row["_images"], [], [], processor)["image_grid_thw"].tolist()
        counts = (math.prod(grid) // processor.image_processor.merge_size**2 for grid in grids)
        image_token = self.processor.tokenizer.convert_tokens_to_ids(plugin.image_token)
        repeats = [(at, next(counts)) for at, token in enumerate(ids) if token == image_token]
        ids = _repeat(ids, repeats)
        labels = labels if self.generate else _repeat(labels, repeats)
        result |= {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "labels": [labels]}
        return result, len(ids) + (len(labels) if self.generate else 0)

    def print_data_example(self, example: Mapping[str, Any]) -> None:
        """Print an example as LLaMA-Factory does."""
        self.processor.print_data_example(example)


def _repeat(values: Sequence[int], repeats: Sequence[tuple[int, int]]) -> list[int]:
    """Return the values, those at the given (position, count) pairs repeated."""
    repeated: list[int] = []
    start = 0
    for position, count in repeats:
        repeated += values[start:position]
        repeated += [values[position]] * count
        start = position + 1
    return repeated + list(values[start:])


def _explain(record: Instruction, length: int, cutoff: int, dropped: int, over_cutoff: str) -> str:
    needs = f"Record {record.id} needs {length} tokens, but cutoff_len is {cutoff}"
    remedy = f"Set cutoff_len: {length} or more, or a smaller image_max_pixels"
    if over_cutoff == "raise" and drop_distractor(record) is not None:
        return f"{needs} and chatreid_over_cutoff is raise. {remedy}, or chatreid_over_cutoff: trim."
    if dropped:
        return f"{needs}, even after {dropped} gallery image(s) that are no match have been left out. {remedy}."
    return f"{needs}, and it has no gallery images that could be left out. {remedy}."


def guard_processors(module: ModuleType) -> None:
    """Put the guard before LLaMA-Factory's dataset processors, inside ``llamafactory.data.loader``."""
    get_processor = get_function(module, "_get_dataset_processor")

    @wraps(get_processor)
    def get_guarded_processor(
        data_args: Any, stage: str, template: Any, tokenizer: Any, processor: Any, do_generate: bool = False
    ) -> Any:
        dataset_processor = get_processor(data_args, stage, template, tokenizer, processor, do_generate)
        if stage != "sft" or not str(data_args.template).startswith("chatreid"):
            return dataset_processor
        # getattr: LLaMA-Factory's own DataArguments, made in Python, do not have the key.
        over_cutoff = getattr(data_args, "chatreid_over_cutoff", "trim")
        uncut_args = copy.copy(data_args)
        uncut_args.cutoff_len, uncut_args.packing = sys.maxsize, False
        uncut_template = copy.copy(template)
        uncut_template.mm_plugin = copy.copy(template.mm_plugin)
        uncut_template.mm_plugin.expand_mm_tokens = False
        remembering = RememberingTokenizer(tokenizer)
        uncut = get_processor(uncut_args, stage, uncut_template, remembering, processor, do_generate)
        return CutoffGuard(dataset_processor, uncut, over_cutoff, do_generate)

    module._get_dataset_processor = get_guarded_processor  # type: ignore[attr-defined]


def note_trimmed(record_id: str, images: int) -> None:
    """Write down that a record has lost this many images; nothing outside a run."""
    path = os.environ.get(LIST_VARIABLE)
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # One short write at the end of the file: lines of several processes do not mix (POSIX, O_APPEND).
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{record_id}\t{images}\n")


def start_trimmed_list(training_args: Any) -> None:
    """Make ``chatreid_trimmed.txt`` in the output folder this run's list; a resumed run continues it."""
    path = Path(training_args.output_dir) / LIST_NAME
    os.environ[LIST_VARIABLE] = str(path.absolute())
    if training_args.process_index == 0 and training_args.resume_from_checkpoint is None:
        # The other processes wait for this one inside get_dataset, before they tokenize anything.
        path.unlink(missing_ok=True)


def _read_list(path: Path) -> dict[str, int]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {record_id: int(images) for record_id, images in (line.split("\t") for line in lines)}


def describe_trimmed() -> str | None:
    """Return what the list says so far, each record counted once; None if nothing has been trimmed."""
    path = Path(os.environ.get(LIST_VARIABLE, LIST_NAME))
    trimmed = _read_list(path)
    if not trimmed:
        return None
    images = sum(trimmed.values())
    return f"{len(trimmed)} record(s) over cutoff_len lost {images} gallery image(s); {path} lists them."


def _list_image_records(dataset: Any, column: str) -> Iterator[pa.Array]:
    """Yield batches of the record id of every image of a data set."""
    for batch in dataset.select_columns(column).with_format("arrow").iter(batch_size=10_000):
        for chunk in batch[column].chunks:
            yield chunk.flatten().field("record")


def note_mapped(aligned: Any, tokens: Any) -> None:
    """Write down what a map has trimmed, where its result comes from datasets' cache and nothing was tokenized.

    Args:
        aligned: the data set with ``_images`` before the map.
        tokens: the one with ``images`` after it; packed or not.
    """
    path = os.environ.get(LIST_VARIABLE)
    before, after = (sum(map(len, _list_image_records(*pair))) for pair in ((aligned, "_images"), (tokens, "images")))
    if path is None or before == after:
        return
    lost: Counter[str] = Counter()
    for dataset, column, sign in ((aligned, "_images", 1), (tokens, "images", -1)):
        for records in _list_image_records(dataset, column):
            for count in records.value_counts().to_pylist():
                lost[count["values"]] += sign * count["counts"]
    known = _read_list(Path(path))
    for record_id, images in lost.items():
        if images and record_id and record_id not in known:
            note_trimmed(record_id, images)


def copy_trimmed(folder: Path, back: bool = False) -> None:
    """Keep the run's list beside saved tokens, or bring it ``back`` with them.

    Args:
        folder: with the tokens.
        back: from the folder to the run.
    """
    path = os.environ.get(LIST_VARIABLE)
    if path is None:
        return
    source, target = (folder / LIST_NAME, Path(path)) if back else (Path(path), folder / LIST_NAME)
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


class TrimmedReport(TrainerCallback):
    """Says at the end of each epoch, on the first process, how many records have been trimmed so far.

    Data loader workers tokenize, so this process reads the list that they write. Without a shared file system, the
    list holds the first node's records alone.
    """

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print one line if there is something to say."""
        line = describe_trimmed() if state.is_world_process_zero else None
        if line is not None:
            say(f"chatreid: {line}", aside=True)

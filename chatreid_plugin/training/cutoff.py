"""The cutoff guard: a record over ``cutoff_len`` loses whole gallery images or is refused, never a part of an image.

Stock LLaMA-Factory cuts the token ids: image tokens without their image stop the model steps later with a shape
mismatch, and a cut answer is learnt as it is.
"""

import copy
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from types import ModuleType
from typing import Any

from ..answers import render_turns
from ..errors import DataError
from ..records import INSTRUCTION_SCHEMA, Answer, Instruction, convert_row_to_instruction
from ..tasks import LETTER_KINDS, get_task
from .code_version import find_code_version
from .compat import get_function
from .thinned import note_thinned
from .token_cache import RememberingTokenizer


OVER_CUTOFF = ("thin", "raise")
RECORD_COLUMN = "_chatreid_record"


def pack_record(row: Mapping[str, Any], own_prompts: Sequence[str]) -> str:
    """Return a shard's row and the user's wordings as one string, which Arrow stores whatever is empty in it."""
    return json.dumps([{name: row[name] for name in INSTRUCTION_SCHEMA.names if name in row}, list(own_prompts)])


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

    thinned = replace(
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
    return thinned, position


@dataclass
class CutoffGuard:
    """LLaMA-Factory's dataset processor of supervised training or generation, kept from cutting ChatReID records.

    Attributes:
        processor: LLaMA-Factory's.
        uncut: the same, but it neither packs nor cuts, and writes one image token for each image. The guard repeats
            the tokens: a tokenizer that has to find hundreds of them in a text takes most of its time for that.
        over_cutoff: ``thin`` or ``raise``.
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
            DataError: a record is too long, and cannot or must not be thinned.
        """
        columns = {name: values for name, values in examples.items() if name != RECORD_COLUMN}
        packed: Sequence[Any] = examples.get(RECORD_COLUMN) or [None] * len(columns["_prompt"])
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        encoded: list[Mapping[str, list[Any]]] = []
        for index, (row, record) in enumerate(zip(rows, packed, strict=True)):
            if record is None:  # another data set in the mixture: LLaMA-Factory's to cut
                encoded.append(self.processor.preprocess_dataset({name: [value] for name, value in row.items()}))
            else:
                rows[index], result = self._fit(row, record)
                encoded.append(result)
        if self.processor.data_args.packing and not self.generate:
            return self.processor.preprocess_dataset({name: [row[name] for row in rows] for name in columns})
        names = dict.fromkeys(name for result in encoded for name in result)
        return {name: [value for result in encoded for value in result.get(name, ())] for name in names}

    def _fit(self, row: dict[str, Any], packed: str) -> tuple[dict[str, Any], Mapping[str, list[Any]]]:
        """Return an aligned record that fits, thinned if need be, and its columns."""
        cutoff = self.processor.data_args.cutoff_len
        result, length = self._encode(row)
        if length <= cutoff:
            return row, result
        values, own_prompts = json.loads(packed)
        record = convert_row_to_instruction(values)
        fitted, images = row, list(row["_images"])
        while length > cutoff:
            smaller = drop_distractor(record) if self.over_cutoff == "thin" else None
            if smaller is None:
                raise DataError(_explain(record, length, cutoff, len(row["_images"]) - len(images), self.over_cutoff))
            record, position = smaller
            del images[position]
            fitted = row | make_messages(record, own_prompts) | {"_images": images}
            result, length = self._encode(fitted)
        note_thinned(record.id, len(row["_images"]) - len(images))
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
        return f"{needs} and chatreid_over_cutoff is raise. {remedy}, or chatreid_over_cutoff: thin."
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
        over_cutoff = getattr(data_args, "chatreid_over_cutoff", "thin")
        uncut_args = copy.copy(data_args)
        uncut_args.cutoff_len, uncut_args.packing = sys.maxsize, False
        uncut_template = copy.copy(template)
        uncut_template.mm_plugin = copy.copy(template.mm_plugin)
        uncut_template.mm_plugin.expand_mm_tokens = False
        remembering = RememberingTokenizer(tokenizer)
        uncut = get_processor(uncut_args, stage, uncut_template, remembering, processor, do_generate)
        return CutoffGuard(dataset_processor, uncut, over_cutoff, do_generate)

    module._get_dataset_processor = get_guarded_processor  # type: ignore[attr-defined]

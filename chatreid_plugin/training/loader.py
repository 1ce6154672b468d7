"""ChatReID records on their way into a batch: shard row, conversation, tokens.

LLaMA-Factory maps a data set twice before the first step: ``align_dataset`` makes conversations of its rows, and
``_get_preprocessed_dataset`` tokens of those, into a cache of 13 bytes a token. Our records take one of two ways:

- ``chatreid_lazy``: both are left out, and a record is rendered and tokenized as the data loader asks for it.
- The eager mode: both maps, with the columns' types written down. Stock LLaMA-Factory lets ``datasets`` guess them
  from the first thousand rows: rows without images at the front fail ("Couldn't cast array of type list<string> to
  null"), and other image data cannot join ChatReID records in a mixture.

This file imports nothing of LLaMA-Factory: a spawned worker imports it first, to unpickle a ``LazyTokenizer``, and
LLaMA-Factory would call the hook that needs this file while it is half-loaded.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from datasets import Features, Value
from torch.nn.functional import pad

from ..errors import ConfigError, DataError
from ..records import INSTRUCTION_SCHEMA, Instruction, convert_instruction_to_row, convert_row_to_instruction
from ..regular_files import leaves_root
from ..shards import FORMATTING
from ..tasks import TASKS
from ..upstream import get_upstream
from .compat import get_function
from .cutoff import OWN_PROMPTS, ROW_COLUMN, find_code_version, guard_processors, make_messages, note_mapped
from .dataset_info import extend_shard_loading, find_image_root, find_own_prompts
from .images import LIST_NAME, BadImageList, SkippingDataset
from .tokenized_path import guard_tokenized_path


ORIGIN_COLUMN = "chatreid_origin"
TOKEN_TYPES = "mm_token_type_ids"
# Image root and the user's wordings of a data set.
Origin = tuple[str, tuple[str, ...]]
# Those seen so far; a data set carries the index, an integer, instead of a path in every row.
_origins: list[Origin] = []
# What ChatReIDConverter gives for each image.
IMAGE = {
    "path": Value("string"),
    "width": Value("int32"),
    "height": Value("int32"),
    "record": Value("string"),
    "task": Value("string"),
}
_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
# LLaMA-Factory's aligned form, see align_dataset of its data/converter.py, and the row that it was made from.
ALIGNED = Features(
    {
        "_prompt": _MESSAGES,
        "_response": _MESSAGES,
        "_system": Value("string"),
        "_tools": Value("string"),
        "_images": [IMAGE],
        "_videos": [Value("string")],
        "_audios": [Value("string")],
        ROW_COLUMN: {**Features.from_arrow_schema(INSTRUCTION_SCHEMA), OWN_PROMPTS: [Value("string")]},
    }
)
# data/processor/supervised.py: numbers each packed record's images, with 2**32 for none.
_PACKING = {
    "sequence_boundaries": [Value("int32")],
    "image_subseq_ids": [Value("int64")],
    "video_subseq_ids": [Value("int64")],
    "audio_subseq_ids": [Value("int64")],
    "right_padding_length": Value("int32"),
}


def convert_record(record: Instruction, image_root: str, own_prompts: Sequence[str] = ()) -> dict[str, Any]:
    """Return LLaMA-Factory's aligned form of a record.

    Images carry their size and the record's id, so that tokens are counted without opening a file and an unreadable
    file is reported with its record; and its task, for the log of each task's loss.

    Raises:
        DataError: the record does not fit its task, or names an image outside the image root.
    """
    outside = next((image.path for image in record.images if leaves_root(image.path)), None)
    if outside is not None:
        raise DataError(
            f"Record {record.id} names the image {outside!r}, which does not lie below the image root. Build the data "
            "set with `chatreid build`."
        )
    images = [
        {
            "path": os.path.join(image_root, i.path),
            "width": i.width,
            "height": i.height,
            "record": record.id,
            "task": record.task,
        }
        for i in record.images
    ]
    return {
        **make_messages(record, own_prompts),
        "_system": "",
        "_tools": "",
        "_images": images,
        "_videos": None,
        "_audios": None,
        ROW_COLUMN: convert_instruction_to_row(record) | {OWN_PROMPTS: list(own_prompts)},
    }


@dataclass
class ChatReIDConverter:
    """The converter of the eager mode; the lazy mode calls ``convert_record`` itself.

    It is called like LLaMA-Factory's ``DatasetConverter`` but does not inherit from it, which would import it here.
    """

    dataset_attr: Any
    data_args: Any

    def __post_init__(self) -> None:
        self.image_root = find_image_root(self.dataset_attr, self.data_args)
        # datasets caches a map by the pickled function: with the wordings inside, an edited prompt is a new cache.
        self.own_prompts = find_own_prompts(self.dataset_attr)
        self.wordings = repr((TASKS, self.own_prompts))
        self.version = find_code_version()

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Convert one row of a shard."""
        return convert_record(convert_row_to_instruction(example), self.image_root, self.own_prompts)


def register_converter(module: ModuleType) -> None:
    """Register ``formatting: chatreid`` inside ``llamafactory.data.converter``."""
    get_upstream(module, "register_dataset_converter")(FORMATTING, ChatReIDConverter)


@dataclass
class LazyTokenizer:
    """Turns a batch of compact rows into token ids; importable, so that data loader workers can receive it."""

    processor: Any
    origins: list[Origin]

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return ``input_ids``, ``attention_mask``, ``labels``, ``images``, ... for a batch of rows."""
        return self.tokenize(self.convert(rows))

    def convert(self, rows: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """Return the records of a batch of rows in LLaMA-Factory's aligned form; takes the origins out of ``rows``."""
        origins = rows.pop(ORIGIN_COLUMN)
        examples = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        return [
            convert_record(convert_row_to_instruction(example), *self.origins[origin])
            for example, origin in zip(examples, origins, strict=True)
        ]

    def tokenize(self, examples: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """Return the columns that the collator takes, for aligned records."""
        columns = {name: [example[name] for example in examples] for name in examples[0]}
        return dict(self.processor.preprocess_dataset(columns))


@dataclass
class PathConverter:
    """A stock converter of data with image paths, which become dicts like those of ChatReID records."""

    converter: Any

    def __post_init__(self) -> None:
        self.version = find_code_version()

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Convert one row; width and height 0 say that they are to be read from the file."""
        aligned: dict[str, Any] = self.converter(example)
        images = aligned["_images"] and [
            {"path": path, "width": 0, "height": 0, "record": "", "task": ""} for path in aligned["_images"]
        ]
        return aligned | {"_images": images, ROW_COLUMN: None}


def make_token_features(packing: bool, neat_packing: bool) -> Features:
    """Return the types of a tokenized record's columns: 9 bytes a token, where stock LLaMA-Factory writes 13."""
    columns: dict[str, Any] = {
        "input_ids": [Value("int32")],
        # neat_packing numbers the records of a pack in it.
        "attention_mask": [Value("int32" if neat_packing else "int8")],
        "labels": [Value("int32")],
        "images": [IMAGE],
        "videos": [Value("string")],
        "audios": [Value("string")],
    }
    if packing:
        columns["position_ids"] = [Value("int32")]
    if neat_packing:
        columns["packing_params"] = _PACKING
    return Features(columns)


def extend_loader(module: ModuleType) -> None:
    """Wrap each step of ``llamafactory.data.loader`` that a ChatReID data set takes otherwise."""
    guard_processors(module)
    guard_tokenized_path(module)
    extend_shard_loading(module)
    align_dataset = get_function(module, "align_dataset")
    preprocess = get_function(module, "_get_preprocessed_dataset")
    get_processor = get_function(module, "_get_dataset_processor")

    @wraps(align_dataset)
    def align_ours(dataset: Any, dataset_attr: Any, data_args: Any, training_args: Any) -> Any:
        # getattr: if the hook of the arguments failed, stock data sets must still load.
        if getattr(data_args, "chatreid_lazy", False):
            return _note_origin(dataset, dataset_attr, data_args)
        ours = str(data_args.template).startswith("chatreid") or dataset_attr.formatting == FORMATTING
        converter = _find_converter(dataset, dataset_attr, data_args) if ours else None
        if converter is None:
            return align_dataset(dataset, dataset_attr, data_args, training_args)
        desc = "Converting format of dataset"
        return _map(dataset, converter, ALIGNED, data_args, training_args, desc=desc)

    @wraps(preprocess)
    def preprocess_ours(
        dataset: Any,
        data_args: Any,
        training_args: Any,
        stage: str,
        template: Any,
        tokenizer: Any,
        processor: Any = None,
        is_eval: bool = False,
    ) -> Any:
        # Those that align_ours has aligned.
        lazy = dataset is not None and ORIGIN_COLUMN in (dataset.column_names or ())
        typed = dataset is not None and stage == "sft" and dataset.features == ALIGNED
        if not lazy and not typed:
            return preprocess(dataset, data_args, training_args, stage, template, tokenizer, processor, is_eval)
        do_generate = training_args.predict_with_generate and is_eval
        dataset_processor = get_processor(data_args, stage, template, tokenizer, processor, do_generate)
        tokenize = _tokenize_lazily if lazy else _tokenize_typed
        tokens = tokenize(dataset, dataset_processor, data_args, training_args, do_generate)
        if training_args.should_log:
            print("eval example:" if is_eval else "training example:")
            dataset_processor.print_data_example(_find_first(tokens))
        return tokens

    module.align_dataset = align_ours  # type: ignore[attr-defined]
    module._get_preprocessed_dataset = preprocess_ours  # type: ignore[attr-defined]


def _note_origin(dataset: Any, dataset_attr: Any, data_args: Any) -> Any:
    """Return the shard's rows as they are, with the number of their origin."""
    if dataset_attr.formatting != FORMATTING:
        raise ConfigError(
            f"chatreid_lazy: true works with ChatReID records only, but data set {dataset_attr} has formatting: "
            f"{dataset_attr.formatting}. Set chatreid_lazy: false to mix them."
        )
    origin = find_image_root(dataset_attr, data_args), find_own_prompts(dataset_attr)
    if origin not in _origins:
        _origins.append(origin)
    return dataset.add_column(ORIGIN_COLUMN, np.full(len(dataset), _origins.index(origin), dtype=np.int32))


def _tokenize_lazily(dataset: Any, processor: Any, data_args: Any, training_args: Any, do_generate: bool) -> Any:
    """Return the data set with the tokenizer as its transform."""
    tokenizer = LazyTokenizer(processor, list(_origins))
    if do_generate:
        # LLaMA-Factory writes the prompts beside the answers, from a column that no transform has.
        features = make_token_features(packing=False, neat_packing=False)
        return dataset.map(tokenizer, batched=True, remove_columns=dataset.column_names, features=features)
    if data_args.chatreid_bad_image == "skip":
        return SkippingDataset(dataset, tokenizer, BadImageList(Path(training_args.output_dir) / LIST_NAME))
    return dataset.with_transform(tokenizer)


def _find_converter(dataset: Any, dataset_attr: Any, data_args: Any) -> Callable[..., Any] | None:
    """Return what gives the rows of a data set the columns of ``ALIGNED``; None if nothing does."""
    import llamafactory.data.converter as module

    converter = get_upstream(module, "get_dataset_converter")(dataset_attr.formatting, dataset_attr, data_args)
    if dataset_attr.formatting == FORMATTING:
        return converter
    if dataset_attr.videos or dataset_attr.audios or dataset.features is None:
        return None
    column = dataset.features.get(dataset_attr.images, Value("null")) if dataset_attr.images else Value("null")
    kind = getattr(column, "feature", column)  # of a list's elements
    return PathConverter(converter) if getattr(kind, "dtype", None) in ("string", "null") else None


def _map(dataset: Any, function: Any, features: Features, data_args: Any, training_args: Any, **changes: Any) -> Any:
    if not data_args.streaming:
        # As LLaMA-Factory's maps: with overwrite_cache, the first process writes and the others read.
        changes["num_proc"] = data_args.preprocessing_num_workers
        changes["load_from_cache_file"] = not data_args.overwrite_cache or training_args.local_process_index != 0
    else:
        changes.pop("desc")
    return dataset.map(function, remove_columns=list(dataset.features), features=features, **changes)


def _tokenize_typed(dataset: Any, processor: Any, data_args: Any, training_args: Any, do_generate: bool) -> Any:
    """Return the tokens of aligned records, with the columns' types written down."""
    packing = bool(data_args.packing) and not do_generate
    tokens = _map(
        dataset,
        processor.preprocess_dataset,
        make_token_features(packing, packing and data_args.neat_packing),
        data_args,
        training_args,
        batched=True,
        batch_size=data_args.preprocessing_batch_size,
        desc="Running tokenizer on dataset",
    )
    if not data_args.streaming and training_args.process_index == 0:
        note_mapped(dataset, tokens)
    return tokens


def _find_first(tokens: Any) -> dict[str, Any]:
    example = next(iter(tokens), None)
    if example is None:
        raise DataError("No record is left after tokenization: none is a conversation that can be trained.")
    return example


def fit_token_types(batch: dict[str, Any], padding_side: str) -> None:
    """Drop the token types (B, L) of a batch that has position ids; else pad them to its ``input_ids`` (B, padded L).

    ``ChatReIDPlugin.get_mm_inputs`` hands them to whoever generates; with position ids the collator has used them, and
    training's batches stay what they were. LLaMA-Factory pads them to the longest record only, and the ids of training
    to a multiple of 8.
    """
    types: torch.Tensor = batch.pop(TOKEN_TYPES)
    if "position_ids" in batch:
        return
    missing = batch["input_ids"].shape[1] - types.shape[1]
    batch[TOKEN_TYPES] = pad(types, (missing, 0) if padding_side == "left" else (0, missing))


def extend_collator(module: ModuleType) -> None:
    """Make the collators of ``llamafactory.data.collator`` treat the token types of our templates."""
    collate = get_function(module, "MultiModalDataCollatorForSeq2Seq.__call__")

    @wraps(collate)
    def collate_with_fitted_types(self: Any, features: list[dict[str, Any]]) -> dict[str, Any]:
        # Late: LLaMA-Factory loads its collator before the module that our image plugin extends.
        from .template import ChatReIDPlugin

        batch = collate(self, features)
        if isinstance(self.template.mm_plugin, ChatReIDPlugin) and TOKEN_TYPES in batch:
            fit_token_types(batch, self.tokenizer.padding_side)
        return batch

    get_upstream(module, "MultiModalDataCollatorForSeq2Seq").__call__ = collate_with_fitted_types

"""``chatreid_lazy``: records are rendered and tokenized as the data loader asks for them.

Stock LLaMA-Factory maps the whole data set twice before the first step, into a cache of 13 bytes a token.
"""

from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..records import convert_row_to_instruction
from .bad_images import LIST_NAME, BadImageList, SkippingDataset
from .compat import get_function
from .converter import FORMATTING, convert_record, find_image_root, find_own_prompts
from .cutoff import RECORD_COLUMN, guard_processors, pack_record
from .eager import extend_eager_maps, make_token_features
from .preprocessing import Preprocessing, replace_preprocessing
from .shard_check import extend_shard_loading
from .tokenized_path import guard_tokenized_path


ORIGIN_COLUMN = "chatreid_origin"

# Image root and the user's wordings of a data set.
Origin = tuple[str, tuple[str, ...]]

# Those seen so far; a data set carries the index, an integer, instead of a path in every row.
_origins: list[Origin] = []


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
            | {RECORD_COLUMN: pack_record(example, self.origins[origin][1])}
            for example, origin in zip(examples, origins, strict=True)
        ]

    def tokenize(self, examples: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """Return the columns that the collator takes, for aligned records."""
        columns = {name: [example[name] for example in examples] for name in examples[0]}
        return dict(self.processor.preprocess_dataset(columns))


def extend_loader(module: ModuleType) -> None:
    """Make ``llamafactory.data.loader`` skip both maps for ChatReID records when ``chatreid_lazy`` is set."""
    guard_processors(module)
    guard_tokenized_path(module)
    extend_eager_maps(module)
    align_dataset = get_function(module, "align_dataset")

    @wraps(align_dataset)
    def align_lazily(dataset: Any, dataset_attr: Any, data_args: Any, training_args: Any) -> Any:
        # getattr: if the hook of the arguments failed, stock data sets must still load.
        if not getattr(data_args, "chatreid_lazy", False):
            return align_dataset(dataset, dataset_attr, data_args, training_args)
        _check_lazy(dataset_attr, data_args)
        origin = find_image_root(dataset_attr, data_args), find_own_prompts(dataset_attr)
        if origin not in _origins:
            _origins.append(origin)
        return dataset.add_column(ORIGIN_COLUMN, np.full(len(dataset), _origins.index(origin), dtype=np.int32))

    extend_shard_loading(module)
    replace_preprocessing(
        module, lambda dataset, stage: ORIGIN_COLUMN in (dataset.column_names or ()), _tokenize_lazily
    )
    module.align_dataset = align_lazily  # type: ignore[attr-defined]


def _tokenize_lazily(job: Preprocessing) -> Any:
    """Return the data set with the tokenizer as its transform."""
    dataset = job.dataset
    tokenizer = LazyTokenizer(job.processor, list(_origins))
    if job.do_generate:
        # LLaMA-Factory writes the prompts beside the answers, from a column that no transform has.
        features = make_token_features(packing=False, neat_packing=False)
        return dataset.map(tokenizer, batched=True, remove_columns=dataset.column_names, features=features)
    if job.data_args.chatreid_bad_image == "skip":
        bad_images = BadImageList(Path(job.training_args.output_dir) / LIST_NAME)
        lazy: Any = SkippingDataset(dataset, tokenizer, bad_images)
    else:
        lazy = dataset.with_transform(tokenizer)
    job.print_example(lambda: lazy[0])
    return lazy


def _check_lazy(dataset_attr: Any, data_args: Any) -> None:
    if dataset_attr.formatting != FORMATTING:
        raise ConfigError(
            f"chatreid_lazy: true works with ChatReID records only, but data set {dataset_attr} has formatting: "
            f"{dataset_attr.formatting}. Set chatreid_lazy: false to mix them."
        )
    for key in ("streaming", "packing", "tokenized_path"):
        if getattr(data_args, key):
            raise ConfigError(f"chatreid_lazy: true and {key} exclude each other; set one of them to false or null.")

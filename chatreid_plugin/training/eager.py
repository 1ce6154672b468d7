"""The eager mode: LLaMA-Factory's two maps of a data set, with the columns' types written down.

Stock LLaMA-Factory lets ``datasets`` guess them from the first thousand rows: rows without images at the front fail
("Couldn't cast array of type list<string> to null"), and other image data cannot join ChatReID records in a mixture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

from datasets import Features, Value

from ..errors import DataError
from ..upstream import get_upstream
from .compat import get_function
from .converter import FORMATTING
from .cutoff import RECORD_COLUMN, find_code_version, note_mapped
from .preprocessing import Preprocessing, replace_preprocessing


# What ChatReIDConverter gives for each image.
IMAGE = {"path": Value("string"), "width": Value("int32"), "height": Value("int32"), "record": Value("string")}
_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
# LLaMA-Factory's aligned form, see align_dataset of its data/converter.py, and the record behind it.
ALIGNED = Features(
    {
        "_prompt": _MESSAGES,
        "_response": _MESSAGES,
        "_system": Value("string"),
        "_tools": Value("string"),
        "_images": [IMAGE],
        "_videos": [Value("string")],
        "_audios": [Value("string")],
        RECORD_COLUMN: Value("string"),
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
            {"path": path, "width": 0, "height": 0, "record": ""} for path in aligned["_images"]
        ]
        return aligned | {"_images": images, RECORD_COLUMN: None}


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


def extend_eager_maps(module: ModuleType) -> None:
    """Give both maps of ``llamafactory.data.loader`` explicit types when the template is ours."""
    align_dataset = get_function(module, "align_dataset")

    @wraps(align_dataset)
    def align_typed(dataset: Any, dataset_attr: Any, data_args: Any, training_args: Any) -> Any:
        ours = str(data_args.template).startswith("chatreid") or dataset_attr.formatting == FORMATTING
        converter = _find_converter(dataset, dataset_attr, data_args) if ours else None
        if converter is None:
            return align_dataset(dataset, dataset_attr, data_args, training_args)
        desc = "Converting format of dataset"
        return _map(dataset, converter, ALIGNED, data_args, training_args, desc=desc)

    replace_preprocessing(
        module, lambda dataset, stage: stage == "sft" and dataset.features == ALIGNED, _tokenize_typed
    )
    module.align_dataset = align_typed  # type: ignore[attr-defined]


def _tokenize_typed(job: Preprocessing) -> Any:
    """Return the tokens of aligned records."""
    packing = bool(job.data_args.packing) and not job.do_generate
    tokens = _map(
        job.dataset,
        job.processor.preprocess_dataset,
        make_token_features(packing, packing and job.data_args.neat_packing),
        job.data_args,
        job.training_args,
        batched=True,
        batch_size=job.data_args.preprocessing_batch_size,
        desc="Running tokenizer on dataset",
    )
    if not job.data_args.streaming and job.training_args.process_index == 0:
        note_mapped(job.dataset, tokens)
    job.print_example(lambda: _find_first(tokens))
    return tokens


def _find_first(tokens: Any) -> dict[str, Any]:
    example = next(iter(tokens), None)
    if example is None:
        raise DataError("No record is left after tokenization: none is a conversation that can be trained.")
    return example

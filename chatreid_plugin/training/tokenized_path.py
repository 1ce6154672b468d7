"""The guard of ``tokenized_path``: a stamp says what the saved tokens were made from, and nothing is half-written.

Stock LLaMA-Factory reads any folder that is not empty, whatever the other keys of the run say.
"""

import json
import os
import shutil
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash

from .. import __version__
from ..errors import ConfigError
from ..shards import FORMATTING, read_json, write_json
from ..tasks import TASKS
from ..upstream import get_upstream
from .compat import get_function
from .cutoff import copy_trimmed
from .dataset_info import find_image_root, find_own_prompts


STAMP = "chatreid_tokens.json"
# The keys that change tokens, labels, image paths or the choice of records.
DATA_KEYS = (
    "template",
    "default_system",
    "cutoff_len",
    "train_on_prompt",
    "mask_history",
    "packing",
    "neat_packing",
    "max_samples",
    "val_size",
    "mix_strategy",
    "interleave_probs",
    "chatreid_stage",
    "chatreid_aspect",
    "chatreid_over_cutoff",
)
PROCESSOR_KEYS = ("image_max_pixels", "image_min_pixels")


def _digest(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _digest_tokenizer(tokenizer: Any) -> str:
    """Return a hash of what a tokenizer makes of a text: its model, merges and added tokens (tokenizer.json)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _digest(sorted(tokenizer.get_vocab().items()))
    # How a batch was last padded or truncated is kept there too, and is no part of the files.
    return _digest({k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")})


def _describe_dataset(dataset_attr: Any, data_args: Any) -> dict[str, str]:
    """Return where a data set's records and images are, and a fingerprint of the records.

    The fingerprint is the one of ``chatreid build`` where there is one, else of the files' names, sizes and times.
    """
    path = Path(data_args.dataset_dir) / str(dataset_attr.dataset_name)
    provenance = path.with_name(f"{path.name}.json")
    if dataset_attr.formatting == FORMATTING and provenance.is_file():
        records = str(read_json(provenance).get("fingerprint"))
    else:
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        records = _digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    prompts = _digest(find_own_prompts(dataset_attr))
    return {"records": records, "images": find_image_root(dataset_attr, data_args), "prompts": prompts}


def make_stamp(list_datasets: Any, data_args: Any, tokenizer: Any, processor: Any) -> dict[str, Any]:
    """Return everything that the tokens of a run depend on.

    Args:
        list_datasets: LLaMA-Factory's ``get_dataset_list``.
        data_args: the parsed data arguments.
        tokenizer: the tokenizer.
        processor: the processor, which carries the pixel limits.
    """
    stamp: dict[str, Any] = {"version": __version__, "prompts": _digest(repr(TASKS))}
    stamp |= {key: getattr(data_args, key, None) for key in DATA_KEYS}
    stamp |= {key: getattr(processor, key, None) for key in PROCESSOR_KEYS}
    image_processor = getattr(processor, "image_processor", None)
    numbers = {key: getattr(image_processor, key, None) for key in ("patch_size", "merge_size", "size")}
    stamp |= {"tokenizer": _digest_tokenizer(tokenizer), "image processor": _digest(repr(numbers))}
    for key in ("dataset", "eval_dataset"):
        names: list[str] = getattr(data_args, key) or []
        for name, dataset_attr in zip(names, list_datasets(names, data_args.dataset_dir), strict=True):
            described = _describe_dataset(dataset_attr, data_args)
            stamp |= {f"{key} {name}: {part}": value for part, value in described.items()}
    # As it comes back from the file: a tuple is a list there.
    return json.loads(json.dumps(stamp, default=str))


def check_stamp(folder: Path, stamp: Mapping[str, Any]) -> None:
    """Refuse saved tokens that this run would not make itself.

    Args:
        folder: ``tokenized_path``.
        stamp: of this run.

    Raises:
        ConfigError: the folder has no stamp, or its stamp differs; says what differs.
    """
    remedy = f"Remove {folder} to tokenize again, or set another tokenized_path."
    if not (folder / STAMP).is_file():
        raise ConfigError(f"tokenized_path: {folder} holds no tokens that this plugin has written whole. {remedy}")
    found: dict[str, Any] = read_json(folder / STAMP)
    keys = sorted(key for key in found.keys() | stamp.keys() if found.get(key) != stamp.get(key))
    different = [f"{key} is {_show(stamp.get(key))}, was {_show(found.get(key))}" for key in keys]
    if different:
        raise ConfigError(f"tokenized_path: {folder} was made from something else: {'; '.join(different)}. {remedy}")


def _show(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def guard_tokenized_path(module: ModuleType) -> None:
    """Check or write the stamp around ``get_dataset``, inside ``llamafactory.data.loader``."""
    get_dataset = get_function(module, "get_dataset")
    list_datasets = get_upstream(module, "get_dataset_list")

    @wraps(get_dataset)
    def get_stamped_dataset(
        template: Any,
        model_args: Any,
        data_args: Any,
        training_args: Any,
        stage: str,
        tokenizer: Any,
        processor: Any = None,
    ) -> Any:
        arguments = (template, model_args, data_args, training_args, stage, tokenizer, processor)
        if data_args.tokenized_path is None or not str(data_args.template).startswith("chatreid"):
            return get_dataset(*arguments)
        folder = Path(data_args.tokenized_path).absolute()
        stamp = make_stamp(list_datasets, data_args, tokenizer, processor)
        if folder.is_dir() and any(folder.iterdir()):
            check_stamp(folder, stamp)
            if training_args.process_index == 0:
                copy_trimmed(folder, back=True)
            return get_dataset(*arguments)
        temporary = folder.with_name(f".{folder.name}.chatreid.tmp")
        # The first process before all others: those would take what a killed run left for finished tokens.
        with training_args.main_process_first(local=False, desc="clear unfinished tokens"):
            if training_args.should_save:
                shutil.rmtree(temporary, ignore_errors=True)
        # One name in all processes: it is a part of the key of datasets' map cache, which they share.
        data_args.tokenized_path = str(temporary)
        try:
            datasets = get_dataset(*arguments)
        finally:
            data_args.tokenized_path = str(folder)
        if training_args.should_save:
            copy_trimmed(temporary)
            write_json(temporary / STAMP, stamp)
            shutil.rmtree(folder, ignore_errors=True)  # empty, as seen above
            os.replace(temporary, folder)
        return datasets

    module.get_dataset = get_stamped_dataset  # type: ignore[attr-defined]

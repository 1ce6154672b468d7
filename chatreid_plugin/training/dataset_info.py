"""ChatReID data sets as dataset_info.json enters them: image root, the user's wordings, shards that are whole."""

import os
import re
from collections.abc import Iterable, Sequence
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ChatReIDError, DataError
from ..shards import DATASET_INFO, FORMATTING, HELD_OUT, check_shard, read_json
from ..upstream import get_upstream
from .compat import get_function


# `dataset: chatreid_stage2` stands for all data sets of the stage that `chatreid build` made.
STAGE_NAME = re.compile(r"chatreid_stage[123]")
REBUILD = "Build it with `chatreid build`."


def keep_image_root(module: ModuleType) -> None:
    """Keep the ``chatreid`` block of a dataset_info.json entry, which ``DatasetAttr.join`` drops otherwise."""
    attributes = get_upstream(module, "DatasetAttr")
    join = get_function(module, "DatasetAttr.join")

    @wraps(join)
    def join_with_chatreid(self: Any, attr: dict[str, Any]) -> None:
        join(self, attr)
        self.chatreid = attr.get("chatreid")

    attributes.join = join_with_chatreid


def find_image_root(dataset_attr: Any, data_args: Any) -> str:
    """Return the absolute folder that a data set's image paths are relative to.

    An explicit ``media_dir`` wins (the images have moved), then ``chatreid.image_root`` of the dataset_info.json
    entry, relative to ``dataset_dir``; both may be absolute.
    """
    root = data_args.media_dir
    if root == data_args.dataset_dir:
        root = os.path.join(root, (getattr(dataset_attr, "chatreid", None) or {}).get("image_root", ""))
    return os.path.realpath(root)


def find_own_prompts(dataset_attr: Any) -> tuple[str, ...]:
    """Return the user's wordings of the data set's task: ``chatreid.prompts`` of the dataset_info.json entry."""
    return tuple((getattr(dataset_attr, "chatreid", None) or {}).get("prompts", ()))


def read_entries(names: Iterable[str] | None, dataset_dir: Any) -> dict[str, dict[str, Any]]:
    """Return data set -> its entry in dataset_info.json, without those that have none; LLaMA-Factory refuses them."""
    try:
        info = read_json(Path(dataset_dir) / DATASET_INFO) if isinstance(dataset_dir, str) else dataset_dir
    except ChatReIDError:  # a data set of the hub, or a mistyped folder
        return {}
    return {name: info[name] for name in dict.fromkeys(names or ()) if isinstance(info.get(name), dict)}


def list_own_datasets(data_args: Any) -> list[str]:
    """Return the data sets of a run that are ChatReID records."""
    entries = read_entries([*(data_args.dataset or ()), *(data_args.eval_dataset or ())], data_args.dataset_dir)
    return [name for name, entry in entries.items() if entry.get("formatting") == FORMATTING]


def is_local(dataset_dir: Any) -> bool:
    """Return whether ``dataset_dir`` names a folder, and no hub or mapping, which LLaMA-Factory takes as well."""
    return isinstance(dataset_dir, str) and dataset_dir != "ONLINE" and not dataset_dir.startswith("REMOTE:")


def expand_stages(names: Sequence[str] | None, dataset_dir: Any, held_out: bool = False) -> list[str] | None:
    """Return the names with each stage's name replaced by the data sets that ``chatreid build`` made for it.

    They are concatenated by LLaMA-Factory, so that the mix is the build's own. A stage of which nothing was built
    keeps its name, which ``check_dataset_names`` refuses with the reasons.

    Args:
        names: data sets, e.g. ``["chatreid_stage2"]``.
        dataset_dir: where ``dataset_info.json`` lies.
        held_out: take the data sets of people who do not train.
    """
    if not names or not is_local(dataset_dir) or not any(map(STAGE_NAME.fullmatch, names)):
        return None if names is None else list(names)
    path = Path(dataset_dir) / DATASET_INFO
    entries: Any = read_json(path) if path.is_file() else {}
    expanded: list[str] = []
    for name in names:
        found = list_built(name, entries, held_out) if STAGE_NAME.fullmatch(name) and name not in entries else []
        expanded += found or [name]
    return list(dict.fromkeys(expanded))


def list_built(stage_name: str, entries: Iterable[str], held_out: bool = False) -> list[str]:
    """Return the entries that are data sets of a stage (``chatreid_stage2``), trained or held out."""
    return [e for e in entries if e.startswith(f"{stage_name}_") and e.endswith(HELD_OUT) == held_out]


def check_dataset_files(dataset_attr: Any, data_args: Any) -> None:
    """Read the footer of every shard of a local ChatReID data set.

    ``datasets`` stops at a shard that a full disk or a broken copy has cut short, with a traceback of its internals.

    Raises:
        DataError: the folder is missing, empty, half-built or holds other files, or a shard is cut short.
    """
    if dataset_attr.formatting != FORMATTING or dataset_attr.load_from != "file":
        return
    path = Path(data_args.dataset_dir) / dataset_attr.dataset_name
    if not path.exists():
        raise DataError(f"Data set {dataset_attr}: {path} does not exist. {REBUILD}")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if not files:
        raise DataError(f"Data set {dataset_attr}: {path} is empty. {REBUILD}")
    provenance = path.with_name(f"{path.name}.json")
    if provenance.is_file() and not read_json(provenance).get("complete", True):
        raise DataError(f"Data set {dataset_attr}: {path} is only half-built, as {provenance.name} says. {REBUILD}")
    shards = [file for file in files if file.suffix == ".parquet"]
    # Records in JSON Lines are LLaMA-Factory's to judge; a mixture it refuses without naming the file.
    if shards and len(shards) < len(files):
        foreign = next(file for file in files if file not in shards)
        raise DataError(f"Data set {dataset_attr}: {foreign} is no Parquet shard. Move it out of {path}.")
    if sum(map(check_shard, shards)) == 0 and shards:
        raise DataError(f"Data set {dataset_attr}: {path} holds no records. {REBUILD}")


def extend_shard_loading(module: ModuleType) -> None:
    """Check the shards first, inside ``llamafactory.data.loader``."""
    load_single_dataset = get_function(module, "_load_single_dataset")

    @wraps(load_single_dataset)
    def load_checked_dataset(dataset_attr: Any, model_args: Any, data_args: Any, training_args: Any) -> Any:
        check_dataset_files(dataset_attr, data_args)
        return load_single_dataset(dataset_attr, model_args, data_args, training_args)

    module._load_single_dataset = load_checked_dataset  # type: ignore[attr-defined]

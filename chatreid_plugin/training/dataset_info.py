"""ChatReID data sets as dataset_info.json enters them: image root, the user's wordings, shards that are whole."""

import os
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import DataError
from ..shards import check_shard, read_json
from ..upstream import get_upstream
from .compat import get_function


FORMATTING = "chatreid"
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

"""``formatting: chatreid``: compact records become LLaMA-Factory conversations when they are read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

from ..errors import DataError
from ..records import Instruction, convert_row_to_instruction
from ..regular_files import leaves_root
from ..tasks import TASKS
from ..upstream import get_upstream
from .compat import get_function
from .cutoff import RECORD_COLUMN, find_code_version, make_messages, pack_record


FORMATTING = "chatreid"


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


def convert_record(record: Instruction, image_root: str, own_prompts: Sequence[str] = ()) -> dict[str, Any]:
    """Return LLaMA-Factory's aligned form of a record.

    Images carry their size and the record's id, so that tokens are counted without opening a file and an unreadable
    file is reported with its record.

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
        {"path": os.path.join(image_root, i.path), "width": i.width, "height": i.height, "record": record.id}
        for i in record.images
    ]
    return {
        **make_messages(record, own_prompts),
        "_system": "",
        "_tools": "",
        "_images": images,
        "_videos": None,
        "_audios": None,
    }


@dataclass
class ChatReIDConverter:
    """The converter of the eager mode; the lazy mode calls ``convert_record`` itself.

    It is called like LLaMA-Factory's ``DatasetConverter`` but does not inherit from it: a spawned worker imports this
    module first, to unpickle a ``LazyTokenizer``, and importing LLaMA-Factory from here would call the hook that needs
    this module while it is half-loaded.
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
        aligned = convert_record(convert_row_to_instruction(example), self.image_root, self.own_prompts)
        return aligned | {RECORD_COLUMN: pack_record(example, self.own_prompts)}


def register_converter(module: ModuleType) -> None:
    """Register ``formatting: chatreid`` inside ``llamafactory.data.converter``."""
    get_upstream(module, "register_dataset_converter")(FORMATTING, ChatReIDConverter)


def keep_image_root(module: ModuleType) -> None:
    """Keep the ``chatreid`` block of a dataset_info.json entry, which ``DatasetAttr.join`` drops otherwise."""
    attributes = get_upstream(module, "DatasetAttr")
    join = get_function(module, "DatasetAttr.join")

    @wraps(join)
    def join_with_chatreid(self: Any, attr: dict[str, Any]) -> None:
        join(self, attr)
        self.chatreid = attr.get("chatreid")

    attributes.join = join_with_chatreid

"""``chatreid_bad_image: skip``: a record with an unreadable image is replaced, and the file is listed.

Only lazy mode can do so: there the next record can be drawn and tokenized as the data loader asks. The images are
decoded once, in the process that tokenizes the record, which is also the one that makes the batch of it: pixels wait
beside their paths for the collator of the same worker, and no more than the finished batch goes through its queue.
"""

import fcntl
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import DataError
from ..printing import say
from .image_files import decode_image, describe_image


BAD_IMAGE = ("raise", "skip")
LIST_NAME = "chatreid_bad_images.jsonl"
# More unreadable records one after another mean that a folder is not mounted, not that files are damaged.
LONGEST_RUN = 100


class Tokenizer(Protocol):
    """The two halves of a ``LazyTokenizer``."""

    def convert(self, rows: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """Return the records of a batch of rows in LLaMA-Factory's aligned form."""
        ...

    def tokenize(self, examples: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """Return their columns: ``input_ids``, ``attention_mask``, ``labels``, ``images``, ..."""
        ...


@dataclass
class BadImageList:
    """The JSON Lines file of unreadable images, one line for each, which all processes of a run write to.

    Attributes:
        path: the file; each line has ``path``, ``record`` (the one in which the image was first met) and ``reason``.
        listed: image paths known to be in the file.
        offset: bytes of the file whose images are among ``listed``.
    """

    path: Path
    listed: set[str] = field(default_factory=set[str])
    offset: int = 0

    def add(self, image: dict[str, Any], reason: str) -> None:
        """Append an image and say so on stderr, unless this or another process has already done it."""
        if image["path"] in self.listed:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that a line is one write at the end of the file: without locks (some network file systems)
        # an image may be listed twice, but no two lines mix.
        with self.path.open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            file.seek(self.offset)
            for known in file.read().splitlines():
                with suppress(ValueError):  # cut short by a full disk
                    self.listed.add(json.loads(known)["path"])
            if image["path"] in self.listed:
                return
            line = {"path": image["path"], "record": image["record"], "reason": reason}
            file.write(json.dumps(line).encode() + b"\n")
            self.offset = file.tell()
        self.listed.add(image["path"])
        say(
            f"chatreid: image {describe_image(image)} {reason} Its record is replaced by the next one; "
            f"{len(self.listed)} bad image(s) so far, see {self.path}.",
            aside=True,
        )


class SkippingDataset:
    """The rows of a lazy data set, tokenized, with replacements for records whose images cannot be read.

    A replacement is the following record (after the last comes the first), so that every process, and a run resumed
    from a checkpoint, draws the same one. Evaluation sets are treated alike. Picklable, for data loader workers.
    """

    def __init__(self, rows: Any, tokenizer: Tokenizer, bad_images: BadImageList) -> None:
        """Keep the rows (a ``datasets.Dataset`` without transform) and what they are turned into."""
        self.rows = rows
        self.tokenizer = tokenizer
        self.bad_images = bad_images

    def __len__(self) -> int:
        """Return the number of records, bad ones included."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one record; see ``__getitems__``."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return records as the collator takes them; the data loader asks for a batch at once.

        Each image has ``path``, ``width``, ``height``, ``record`` and ``pixels``: decoded, upright, in RGB.

        Raises:
            IndexError: there is no such record.
            DataError: a record does not fit its task, or 100 in a row have unreadable images.
        """
        examples = self.tokenizer.convert(self.rows[indices])
        readable = [self._find_readable(*pair) for pair in zip(examples, indices, strict=True)]
        columns = self.tokenizer.tokenize(readable)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _find_readable(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        for step in range(1, LONGEST_RUN + 1):
            images = self._decode_images(example["_images"])
            if images is not None:
                return example | {"_images": images}
            (example,) = self.tokenizer.convert(self.rows[[(index + step) % len(self.rows)]])
        raise DataError(
            f"Record {index} of the data set and those after it, {LONGEST_RUN} in a row, have images that cannot be "
            f"read; {self.bad_images.path} lists them. Check that media_dir or image_root is right and mounted."
        )

    def _decode_images(self, images: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
        """Return the images with their pixels; None if one of them is bad, after all bad ones have been listed."""
        decoded: list[dict[str, Any]] = []
        for image in images:
            try:
                pixels = decode_image(image)
            except DataError as error:
                self.bad_images.add(image, str(error).removeprefix(f"Image {describe_image(image)} "))
            else:
                decoded.append(image | {"pixels": pixels, "width": pixels.width, "height": pixels.height})
        return decoded if len(decoded) == len(images) else None


def start_bad_image_list(data_args: Any, training_args: Any) -> None:
    """Remove the list of an earlier run in the same output folder; a resumed run continues it."""
    fresh = training_args.do_train and training_args.resume_from_checkpoint is None
    # The other processes wait for the first inside get_dataset, before they open an image.
    if data_args.chatreid_bad_image == "skip" and fresh and training_args.process_index == 0:
        (Path(training_args.output_dir) / LIST_NAME).unlink(missing_ok=True)

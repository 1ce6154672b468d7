"""The images of a record as training opens them; an unreadable one stops the run, or its record is replaced.

``chatreid_bad_image: skip`` replaces the record and lists the file. Only lazy mode can do so: there the next record
can be drawn and tokenized as the data loader asks. The images are decoded once, in the process that tokenizes the
record, which is also the one that makes the batch of it: pixels wait beside their paths for the collator of the same
worker, and no more than the finished batch goes through its queue.

This file imports nothing of LLaMA-Factory: spawned data loader workers import it before LLaMA-Factory.
"""

import fcntl
import json
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from ..pixels import DAMAGE, convert_to_rgb, read_upright_size
from ..printing import say
from ..regular_files import check_regular


BAD_IMAGE = ("raise", "skip")
LIST_NAME = "chatreid_bad_images.jsonl"
# More unreadable records one after another mean that a folder is not mounted, not that files are damaged.
LONGEST_RUN = 100


def describe_image(image: Any) -> str:
    """Return the image's path and record, as far as they are known."""
    if isinstance(image, dict):
        where = f"{image.get('path')}"
        return f"{where} (record {image['record']})" if image.get("record") else where
    return image if isinstance(image, str) else f"<{type(image).__name__}>"


def open_image(image: Any) -> Image.Image:
    """Open an image given as a path, bytes, a file, a PIL image or a dict with ``pixels``, ``bytes`` or ``path``.

    ``pixels`` is a PIL image: the file, decoded earlier by ``decode_image``; the dict then has its size, too.

    Raises:
        DataError: the file is missing, empty or no image; names the file and, where known, the record.
    """
    source: Any = image
    if isinstance(image, dict):
        source = next((image[key] for key in ("pixels", "bytes") if image.get(key) is not None), image.get("path"))
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes):
        source = BytesIO(source)
    try:
        if isinstance(source, str | Path):
            check_regular(Path(source))
        return Image.open(source)
    except FileNotFoundError:
        raise DataError(f"Image {describe_image(image)} does not exist.") from None
    except UnidentifiedImageError:  # its message may be the address of a buffer
        raise DataError(f"Image {describe_image(image)} cannot be opened: its format is not known") from None
    except DAMAGE as error:
        raise DataError(f"Image {describe_image(image)} cannot be opened: {error}") from None


def read_size(image: Any) -> tuple[int, int]:
    """Return (width, height), upright: from the record if it says, else from the file's header; nothing is decoded."""
    if isinstance(image, dict) and image.get("width") and image.get("height"):
        return image["width"], image["height"]
    opened = open_image(image)
    size = read_upright_size(opened)
    if opened is not image:
        opened.close()
    return size


def _check_size(image: Any, size: tuple[int, int]) -> None:
    # The tokens were counted from the record's size: another image would stop the model with a shape mismatch.
    if isinstance(image, dict) and image.get("width") and image.get("height"):
        stated = image["width"], image["height"]
        if stated != size:
            raise DataError(
                f"Image {describe_image(image)} is {size[0]}x{size[1]} pixels, but the record says "
                f"{stated[0]}x{stated[1]}: the file has been replaced, or it was measured without turning it as its "
                "EXIF data says. Build the records again."
            )


def decode_image(image: Any) -> Image.Image:
    """Return an image's pixels, upright and in RGB, after checking their size against the record's.

    Raises:
        DataError: see ``open_image``; also if the file is cut short or has another size than the record says.
    """
    opened = open_image(image)
    _check_size(image, read_upright_size(opened))
    try:
        return convert_to_rgb(opened)  # here, where the file's name is known, and not inside the image processor
    except DAMAGE as error:
        raise DataError(f"Image {describe_image(image)} is damaged: {error}") from None


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

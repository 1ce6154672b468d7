"""The images of a record as training opens them; what is wrong with one is said with its file and its record.

It imports nothing of LLaMA-Factory: spawned data loader workers import it before LLaMA-Factory.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..crops import DAMAGE, convert_to_rgb, read_upright_size
from ..errors import DataError
from ..regular_files import check_regular


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

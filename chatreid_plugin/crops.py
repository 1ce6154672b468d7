"""A crop's pixels before the image processor sees them; one function for training and evaluation alike."""

import base64
import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import DataError
from .images import ImagePolicy, list_resizes


# What Pillow raises for damaged files of one format or another.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

THUMBNAIL_SIZE = (96, 192)
THUMBNAIL_QUALITY = 80


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB; Pillow alone would turn nearly every 16-bit (infrared) pixel white."""
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def open_crop(path: Path) -> Image.Image:
    """Return the image of a file, decoded, in RGB.

    Raises:
        DataError: the file is missing, no image, or cut short.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return convert_to_rgb(image)
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read as an image: {error}. Replace the file or drop its record.") from None


def prepare_crop(image: Image.Image, policy: ImagePolicy) -> Image.Image:
    """Return the image in RGB, resized as the policy says, step by step as in training.

    The filter is Pillow's default, which LLaMA-Factory's own resizing uses. Converted first: palette images cannot be
    resized smoothly.
    """
    image = convert_to_rgb(image)
    for size in list_resizes(*image.size, policy):
        image = image.resize(size)
    return image


def encode_thumbnail(path: Path) -> str:
    """Return the image as a small JPEG in a data URL; empty if it cannot be read, as a page is no place to fail."""
    try:
        image = open_crop(path)
    except DataError:
        return ""
    image.thumbnail(THUMBNAIL_SIZE)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

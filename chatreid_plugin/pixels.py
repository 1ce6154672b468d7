"""A crop's pixels before the image processor sees them; one function for training and evaluation alike."""

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from .errors import DataError
from .images import ImagePolicy, list_resizes
from .regular_files import open_regular


# What Pillow's readers raise for damaged files of one format or another: whatever they stumble over.
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# A file of 15 kB may promise 16,000,000 x 1 pixels, which take a gigabyte and 15 seconds to scale down.
MAX_SIDE = 2**15
MAX_PIXELS = 2**26

# EXIF 2.32, tag 0x0112: what turns the stored pixels upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

# White in a file of more than 8 bits a pixel: floats from 0 to 1, then the depths of visible and infrared sensors (8,
# 12, 14 and 16 bits), which such files hold without saying which.
_WHITE_LEVELS = (1.0, 255.0, 4095.0, 16383.0, 65535.0)

THUMBNAIL_SIZE = (96, 192)
THUMBNAIL_QUALITY = 80


def _read_orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns it itself, and its size says so before
    try:
        # Not PngImageFile's own, which decodes the pixels to look behind them. Once asked, Pillow keeps the answer, so
        # that the header's size and the decoded pixels agree.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except DAMAGE:
        return 1  # a viewer shows the picture as it is stored, too
    return orientation if orientation in _TURNS else 1


def read_upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the (width, height) that ``convert_to_rgb`` will give an opened image; no pixel is decoded."""
    width, height = image.size
    return (height, width) if _read_orientation(image) in _SIDEWAYS else (width, height)


def _scale_to_bytes(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    highest = float(pixels[np.isfinite(pixels)].max(initial=0.0))
    levels = _WHITE_LEVELS if image.mode == "F" else _WHITE_LEVELS[1:]
    white = next((level for level in levels if highest <= level), highest)
    known = np.nan_to_num(pixels, nan=0.0, posinf=white, neginf=0.0).clip(0.0, white)
    return Image.fromarray(np.rint(known * (255.0 / white)).astype(np.uint8))


def refuse_size(width: int, height: int) -> None:
    """Refuse a size, before anything is decoded, that no crop has.

    Raises:
        ValueError: a side, or their product, is too large.
    """
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels are no crop of a person (at most {MAX_SIDE:,} a side, {MAX_PIXELS:,} in all)"
        )


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB with 8 bits a channel, upright as its EXIF orientation (all 8) says.

    Pillow alone would leave a photograph on its side, turn nearly every 16-bit (infrared) pixel white and every float
    from 0 to 1 black. Here integers of 16 or 32 bits and floats are scaled by their sensor's depth, which is taken to
    be the smallest of 8, 12, 14 and 16 bits that holds the file's highest value (floats: of 0 to 1 first); beyond 16
    bits by that value. Negative values and NaN become black. The scale is linear from 0 and belongs to the sensor, not
    to the picture: stretching each picture's own contrast would show one person dark in one crop and bright in the
    next, and turn noise into shades.

    Transparent pixels are laid over white, as Qwen's own ``qwen_vl_utils`` does: what an editor left below them is no
    part of the picture. PNG files with 16 bits in each of several channels lose their low bytes inside Pillow.

    Args:
        image: opened; for PNG, where EXIF data may follow the pixels and is then ignored, best not yet decoded.

    Returns:
        An image of the size that ``read_upright_size`` says; the same object if there is nothing to do.

    Raises:
        One of ``DAMAGE``: the pixels cannot be decoded or have no colours (LAB), or there are too many.
    """
    refuse_size(*image.size)
    turn = _TURNS.get(_read_orientation(image))
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scale_to_bytes(image)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    image = image.convert("RGB") if image.mode != "RGB" else image
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # without the orientation, or the next call would turn it again
    return image


def open_crop(path: Path) -> Image.Image:
    """Return the image of a file, decoded, upright, in RGB.

    Raises:
        DataError: the file is missing, no regular file, no image, or cut short.
    """
    try:
        with open_regular(path) as file, Image.open(file) as image:
            return convert_to_rgb(image)
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read as an image: {error}. Replace the file or drop its record.") from None


def prepare_crop(image: Image.Image, policy: ImagePolicy) -> Image.Image:
    """Return the image upright and in RGB, resized as the policy says, step by step as in training.

    The filter is Pillow's default, which LLaMA-Factory's own resizing uses. Converted first: palette images cannot be
    resized smoothly.
    """
    image = convert_to_rgb(image)
    for size in list_resizes(*image.size, policy):
        image = image.resize(size)
    return image


def save_image(image: Image.Image, path: Path, *, format: str | None = None, **options: Any) -> None:
    """Write an image in the format of its name's ending, or in the one given.

    Pillow takes a write that a full disk cuts short for a whole one and says nothing.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    buffer = io.BytesIO()
    image.save(buffer, format or Image.registered_extensions()[path.suffix.lower()], **options)
    path.write_bytes(buffer.getvalue())


def encode_picture(image: Image.Image) -> str:
    """Return an image, pixel by pixel, as the data URL of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


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

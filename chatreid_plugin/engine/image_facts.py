"""Every crop is decoded once when its data set is parsed: damage, size, hashes and picture quality are found then."""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy import ndimage
from tqdm import tqdm

from ..errors import DataError
from ..pixels import DAMAGE, convert_to_rgb
from ..regular_files import read_regular
from ..worker_pool import open_pool


# Side of the perceptual hash: 16 x 16 = 256 bits. Crops of one camera share a background, and the usual 64 bits cannot
# tell them apart.
HASH_SIDE = 16
# Sharpness is measured at one size (width, height), or large crops would always look blurred.
SHARPNESS_SIZE = (64, 128)
# Below this many images starting processes takes longer than they save.
SMALLEST_PARALLEL = 512
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the pixels of one crop say.

    Attributes:
        width: pixels, upright as the file's EXIF orientation says.
        height: likewise.
        content_hash: of the file's bytes, 128 bits, hexadecimal.
        perceptual_hash: pHash of 256 bits, hexadecimal: hardly changed by scaling and compression.
        sharpness: variance of the Laplacian of the grey image at 64 x 128 pixels; small when blurred.
        brightness: mean grey level, 0 (black) to 255.
    """

    width: int
    height: int
    content_hash: str
    perceptual_hash: str
    sharpness: float
    brightness: float


def inspect_image(path: Path) -> ImageFacts:
    """Read and decode one image.

    Raises:
        DataError: the file is missing, empty, no regular file, cut short, too large or no image.
    """
    try:
        content = read_regular(path)
        if not content:
            raise DataError(f"{path} is empty (0 bytes). Copy it again or remove it.")
        with Image.open(io.BytesIO(content)) as image:
            grey = convert_to_rgb(image).convert("L")
    except UnidentifiedImageError:
        # Pillow's own message holds a memory address.
        raise DataError(f"{path} is no image that Pillow can read. Copy it again or remove it.") from None
    except DAMAGE as error:
        raise DataError(f"{path} cannot be decoded: {error}. Copy it again or remove it.") from None
    pixels = np.asarray(grey.resize(SHARPNESS_SIZE), dtype=np.float32)
    return ImageFacts(
        width=grey.width,
        height=grey.height,
        content_hash=hashlib.blake2b(content, digest_size=16).hexdigest(),
        perceptual_hash=str(imagehash.phash(grey, hash_size=HASH_SIDE)),
        sharpness=round(float(ndimage.laplace(pixels).var()), 2),
        brightness=round(float(pixels.mean()), 2),
    )


def _try_to_inspect(root: Path, path: str) -> ImageFacts | str:
    try:
        return inspect_image(root / path)
    except DataError as error:
        return str(error)


def inspect_images(
    root: Path, paths: Sequence[str], name: str, workers: int, known: Mapping[str, ImageFacts] | None = None
) -> list[ImageFacts | str]:
    """Return the facts of each image, or the message that says why it cannot be read.

    Args:
        root: the folder that the paths are relative to.
        paths: image files.
        name: of the data set, for the progress bar.
        workers: processes that decode.
        known: path -> facts of images that need not be decoded again.
    """
    known = known or {}
    unknown = [path for path in paths if path not in known]
    inspect = partial(_try_to_inspect, root)
    if workers == 1 or len(unknown) < SMALLEST_PARALLEL:
        found = _show_progress(map(inspect, unknown), name, len(unknown))
    else:
        with open_pool(workers) as pool:
            found = _show_progress(pool.map(inspect, unknown, chunksize=_CHUNK), name, len(unknown))
    facts: dict[str, ImageFacts | str] = {**known, **dict(zip(unknown, found, strict=True))}
    return [facts[path] for path in paths]


def _show_progress(facts: Iterable[ImageFacts | str], name: str, total: int) -> list[ImageFacts | str]:
    return list(tqdm(facts, total=total, desc=name, unit="image"))

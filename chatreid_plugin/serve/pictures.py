"""Pictures out of requests: data URLs alone, since a server that opens paths or addresses could be made to spy.

Their sizes are read first and what they cost is refused by arithmetic; pixels are decoded one picture at a time.
"""

import base64
import binascii
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from ..images import ImagePolicy, PatchGeometry, count_visual_tokens
from ..pixels import DAMAGE, prepare_crop, read_upright_size
from .bodies import RequestFault


# Of one request.
MOST_IMAGES = 128
MOST_PIXELS_TOGETHER = 128_000_000
# Of one picture; a request may hold many that are prepared, and these are not made smaller.
MOST_PIXELS = 16_000_000
MOST_PREPARED_PIXELS = 4_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# Larger than any picture that is taken.
_NO_LIMIT = 1 << 40
# For pictures that come resized: only what the vision tower cannot take at all is changed.
PLAIN = ImagePolicy(None, image_max_pixels=_NO_LIMIT, image_min_pixels=1)
_DATA_URL = re.compile(r"data:image/[A-Za-z0-9.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file out of a request, not decoded yet.

    Attributes:
        content: the file.
        size: width and height, upright.
        policy: how it will be resized.
    """

    content: bytes
    size: tuple[int, int]
    policy: ImagePolicy

    def count_tokens(self, geometry: PatchGeometry) -> int:
        """Return how many tokens it will take."""
        return count_visual_tokens(*self.size, self.policy, geometry)

    def decode(self) -> Image.Image:
        """Return it upright, in RGB, resized.

        Raises:
            RequestFault: it is damaged.
        """
        try:
            with Image.open(io.BytesIO(self.content), formats=FORMATS) as image:
                return prepare_crop(image, self.policy)
        except DAMAGE as error:
            raise RequestFault(f"An image cannot be read: {error}") from None


def check_count(count: int) -> None:
    """Refuse too many pictures, before anything is done with them.

    Raises:
        RequestFault: there are.
    """
    if count > MOST_IMAGES:
        raise RequestFault(f"{count} images are too many; {MOST_IMAGES} is most for one request.", 413)


def open_pictures(urls: Iterable[str], policy: ImagePolicy, *, prepared: bool) -> list[Picture]:
    """Return the pictures of one request.

    Args:
        urls: ``data:image/png;base64,...``.
        policy: how they are resized.
        prepared: they have been resized already and stay as they are.

    Raises:
        RequestFault: no data URL, damaged, of another format, or too large, alone or together.
    """
    policy, most = (PLAIN, MOST_PREPARED_PIXELS) if prepared else (policy, MOST_PIXELS)
    pictures: list[Picture] = []
    pixels = 0
    for url in urls:
        pictures.append(_open_picture(url, policy, most))
        pixels += pictures[-1].size[0] * pictures[-1].size[1]
        if pixels > MOST_PIXELS_TOGETHER:
            raise RequestFault(f"The images have more than {MOST_PIXELS_TOGETHER} pixels together; send fewer.", 413)
    return pictures


def _open_picture(url: str, policy: ImagePolicy, most: int) -> Picture:
    start = _DATA_URL.match(url)
    if start is None:
        raise RequestFault(
            "Images are taken as data URLs only (data:image/png;base64,...); files and addresses are not opened."
        )
    try:
        content = base64.b64decode(url[start.end() :], validate=True)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = read_upright_size(image)
    except UnidentifiedImageError:  # its message is the address of our buffer
        raise RequestFault(f"An image cannot be read: it is none of {', '.join(FORMATS)}.") from None
    except (*DAMAGE, binascii.Error) as error:
        raise RequestFault(f"An image cannot be read: {error}") from None
    if width * height > most:
        raise RequestFault(f"An image of {width}x{height} pixels is too large; {most} is most.")
    return Picture(content, (width, height), policy)

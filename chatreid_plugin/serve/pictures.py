"""Pictures out of requests: data URLs alone, since a server that opens paths or addresses could be made to spy."""

import base64
import binascii
import io
import re

from PIL import Image

from ..crops import DAMAGE, convert_to_rgb, prepare_crop
from ..images import ImagePolicy
from .bodies import RequestFault


MOST_PIXELS = 16_000_000
# A request may hold many, and these are not made smaller.
MOST_PREPARED_PIXELS = 4_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_DATA_URL = re.compile(r"data:image/[A-Za-z0-9.+-]+;base64,")


def read_picture(url: str, policy: ImagePolicy, *, prepared: bool) -> Image.Image:
    """Return the picture of a data URL, upright, in RGB.

    Args:
        url: ``data:image/png;base64,...``.
        policy: how it is resized.
        prepared: it has been resized already and stays as it is.

    Raises:
        RequestFault: no data URL, damaged, of another format, or too large.
    """
    start = _DATA_URL.match(url)
    if start is None:
        raise RequestFault(
            "Images are taken as data URLs only (data:image/png;base64,...); files and addresses are not opened."
        )
    most = MOST_PREPARED_PIXELS if prepared else MOST_PIXELS
    try:
        content = base64.b64decode(url[start.end() :], validate=True)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > most:
                raise RequestFault(f"An image of {image.width}x{image.height} pixels is too large; {most} is most.")
            return convert_to_rgb(image) if prepared else prepare_crop(image, policy)
    except (*DAMAGE, binascii.Error) as error:
        raise RequestFault(f"An image cannot be read: {error}") from None

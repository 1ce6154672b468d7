"""Images as training opens them: in every form, upright, and of the size that their record says."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from chatreid_plugin.errors import DataError
from chatreid_plugin.pixels import convert_to_rgb
from chatreid_plugin.training.images import decode_image, open_image, read_size


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A picture of 64 x 128, stored on its side."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    return tmp_path / "turned.png"


def test_image_is_taken_in_every_form(path: Path) -> None:
    image = Image.open(path)
    forms = [str(path), path.read_bytes(), BytesIO(path.read_bytes()), {"path": str(path)}, image]
    forms += [{"bytes": path.read_bytes(), "path": None}]
    forms += [{"path": "gone.png", "pixels": convert_to_rgb(Image.open(path)), "width": 64, "height": 128}]
    for form in forms:
        assert read_size(form) == (64, 128)
    assert open_image(image) is image  # read_size left it open
    for form in (form for form in forms if not isinstance(form, BytesIO)):
        assert np.array_equal(np.asarray(decode_image(form)), np.asarray(Image.open(path).rotate(-90, expand=True)))


def test_size_that_was_measured_without_turning_is_refused(path: Path) -> None:
    with pytest.raises(DataError, match=r"is 64x128 pixels, but the record says 128x64: .* EXIF"):
        decode_image({"path": str(path), "width": 128, "height": 64, "record": "r"})

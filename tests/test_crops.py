"""A crop's pixels: the resizing steps of training, 16-bit images, and errors that name the file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.crops import convert_to_rgb, encode_thumbnail, open_crop, prepare_crop
from chatreid_plugin.errors import DataError
from chatreid_plugin.images import ImagePolicy


def make_noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_crop_is_enlarged_by_its_stage_before_it_is_reduced_by_the_limit() -> None:
    crop = make_noise(64, 128)
    prepared = prepare_crop(crop, ImagePolicy(1, image_max_pixels=64 * 128))
    expected = crop.resize((128, 256)).resize((64, 128))
    assert prepared.size == (64, 128)
    assert np.array_equal(np.asarray(prepared), np.asarray(expected))
    assert not np.array_equal(np.asarray(prepared), np.asarray(crop))


def test_crop_inside_all_limits_keeps_its_pixels() -> None:
    crop = make_noise(100, 200)
    assert np.array_equal(np.asarray(prepare_crop(crop, ImagePolicy(3))), np.asarray(crop))


def test_sixteen_bit_image_keeps_its_shades() -> None:
    ramp = np.linspace(0, 65535, 64 * 128).reshape(128, 64).astype(np.uint16)
    values = np.asarray(convert_to_rgb(Image.fromarray(ramp)))[..., 0]
    assert values.min() == 0
    assert values.max() == 255
    assert abs(values.mean() - 127.5) < 1


def test_jpeg_data_in_a_file_called_png_is_read(tmp_path: Path) -> None:
    make_noise(48, 128).save(tmp_path / "x.png", "JPEG")
    assert open_crop(tmp_path / "x.png").size == (48, 128)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_unreadable_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.jpg"):
        open_crop(path)


def test_truncated_jpeg_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    make_noise(64, 128).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"cut\.jpg"):
        open_crop(path)


@pytest.mark.parametrize("content", [None, b"no image"])
def test_thumbnail_is_empty_when_the_image_is_unreadable(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    assert encode_thumbnail(path) == ""

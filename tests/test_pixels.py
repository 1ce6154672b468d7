"""A crop's pixels: the resizing steps of training, 16-bit images, and errors that name the file."""

import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image, ImageOps

from chatreid_plugin.errors import DataError
from chatreid_plugin.images import ImagePolicy
from chatreid_plugin.pixels import convert_to_rgb, encode_thumbnail, open_crop, prepare_crop, read_upright_size


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


def make_ramp(white: float, kind: str) -> Image.Image:
    """Return 64 x 128 pixels that rise evenly from 0 to the white level, as an array of a NumPy type."""
    return Image.fromarray(np.linspace(0, white, 64 * 128).reshape(128, 64).astype(kind))


def get_shades(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the converted image's grey levels, after checking that it is grey."""
    converted = convert_to_rgb(image)
    assert converted.mode == "RGB"
    pixels = np.asarray(converted)
    assert np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2])
    return pixels[..., 0]


EVEN = np.linspace(0, 255, 64 * 128).reshape(128, 64)


@pytest.mark.parametrize(
    ("kind", "white"),
    [
        *((kind, white) for kind in ("<u2", "int32") for white in (255, 4095, 16383, 65535)),
        ("int32", 1_000_000),
        *(("float32", white) for white in (1, 255, 4095, 16383, 65535, 1_000_000)),
    ],
)
def test_deep_image_keeps_its_shades(kind: str, white: int) -> None:
    """8, 12, 14 and 16 bits, and beyond, each from black to white."""
    image = make_ramp(white, kind)
    assert image.mode == {"<u2": "I;16", "int32": "I", "float32": "F"}[kind]
    shades = get_shades(image)
    assert len(np.unique(shades)) == 256
    assert np.abs(shades - EVEN).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_deep_file_keeps_its_shades(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"infrared.{suffix}"
    make_ramp(4095, "<u2").save(path)
    assert np.abs(np.asarray(open_crop(path))[..., 0] - EVEN).max() <= 1


def test_big_endian_file_keeps_its_shades() -> None:
    image = Image.frombytes("I;16B", (64, 128), np.asarray(make_ramp(65535, "<u2")).astype(">u2").tobytes())
    assert np.abs(get_shades(image) - EVEN).max() <= 1


def test_dim_and_bright_crops_of_one_sensor_keep_their_difference() -> None:
    """The scale is the sensor's: a stretched contrast would make both equally bright."""
    dim, bright = get_shades(make_ramp(1200, "<u2")), get_shades(make_ramp(3600, "<u2"))
    assert dim.max() == 75 and bright.max() == 224
    assert abs(bright.mean() / dim.mean() - 3) < 0.05


def test_sixteen_bits_are_scaled_exactly() -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert np.array_equal(get_shades(Image.fromarray(values)).ravel(), np.arange(256))


def test_values_that_are_no_brightness_become_black_or_white() -> None:
    values = np.array([[np.nan, -np.inf, -3.0, 0.0], [0.5, 1.0, np.inf, 1.0]], dtype=np.float32)
    assert get_shades(Image.fromarray(values)).tolist() == [[0, 0, 0, 0], [128, 255, 255, 255]]
    assert get_shades(Image.fromarray(np.full((2, 2), -5, np.int32))).tolist() == [[0, 0], [0, 0]]
    assert get_shades(Image.fromarray(np.full((2, 2), np.nan, np.float32))).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("mode", ["L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_mode_of_eight_bits_keeps_its_shades(mode: str) -> None:
    grey = Image.fromarray(np.rint(EVEN).astype(np.uint8))
    image = grey.convert("P" if mode == "PA" else "RGB" if mode == "HSV" else mode).convert(mode)
    assert image.mode == mode
    shades = np.asarray(convert_to_rgb(image)).astype(int)
    assert np.abs(shades - np.rint(EVEN)[..., None]).max() <= 2


def test_one_bit_image_keeps_black_and_white() -> None:
    values = np.asarray(EVEN > 127)
    assert np.array_equal(get_shades(Image.fromarray(values)), values * np.uint8(255))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1"])
def test_transparent_pixels_lie_over_white(mode: str, tmp_path: Path) -> None:
    """Left half: opaque grey, or black where there is no grey; right half: transparent, and another value below it."""
    values = np.zeros((8, 8), np.uint8)
    values[:, :4] = 100
    grey = Image.fromarray(values)
    if mode in ("RGBA", "LA"):
        image = grey.convert(mode)
        image.putalpha(Image.fromarray(np.where(values > 0, 255, 0).astype(np.uint8)))
        image.save(tmp_path / "cut.png")
    elif mode == "1":
        Image.fromarray(values == 0).save(tmp_path / "cut.png", transparency=255)
    else:
        grey.convert(mode).save(tmp_path / "cut.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    with Image.open(tmp_path / "cut.png") as image:
        assert image.mode == mode
        shades = get_shades(image)
    assert (shades[:, :4] == (0 if mode == "1" else 100)).all()
    assert (shades[:, 4:] == 255).all()


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    assert get_shades(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).tolist() == [[127, 127]] * 2


def save_turned(path: Path, orientation: int) -> Image.Image:
    """Write a picture of 40 x 90 so that it is stored turned; return it upright."""
    upright = make_noise(40, 90)
    back = {6: 8, 8: 6}.get(orientation, orientation)  # every other turn undoes itself
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = back
    upright.info["exif"] = exif.tobytes()
    stored = ImageOps.exif_transpose(upright)
    exif[ExifTags.Base.Orientation] = orientation
    stored.info.clear()
    stored.save(path, exif=exif, lossless=True)  # WebP alone reads the word
    upright.info.clear()
    return upright


ORIENTATIONS = range(1, 9)


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_crop_is_turned_upright_once(orientation: int, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"turned.{suffix}"
    upright = save_turned(path, orientation)
    with Image.open(path) as image:
        assert read_upright_size(image) == (40, 90)
        if suffix != "tiff":  # Pillow's own size is upright there
            assert image.size == ((90, 40) if orientation > 4 else (40, 90))
        turned = convert_to_rgb(image)
    assert np.array_equal(np.asarray(turned), np.asarray(upright))
    assert convert_to_rgb(turned) is turned
    assert read_upright_size(turned) == (40, 90)
    assert np.array_equal(np.asarray(prepare_crop(open_crop(path), ImagePolicy(3))), np.asarray(upright))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_jpeg_crop_is_turned_upright(orientation: int, tmp_path: Path) -> None:
    upright = save_turned(tmp_path / "turned.jpg", orientation)
    with Image.open(tmp_path / "turned.jpg") as image:
        # As LLaMA-Factory's API server hands images over: decoded, EXIF still there.
        assert prepare_crop(image.convert("RGB"), ImagePolicy(3)).size == (40, 90)
    small = open_crop(tmp_path / "turned.jpg").resize((5, 10)), upright.resize((5, 10))
    assert np.abs(np.asarray(small[0]).astype(int) - np.asarray(small[1])).mean() < 8


def test_size_agrees_with_the_pixels_where_exif_follows_them(tmp_path: Path) -> None:
    """PNG allows it; the size is asked for without decoding, so neither heeds it."""
    make_noise(40, 90).save(tmp_path / "late.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    content = (tmp_path / "late.png").read_bytes()
    (tmp_path / "late.png").write_bytes(content[:-12] + chunk + content[-12:])
    with Image.open(tmp_path / "late.png") as image:
        assert read_upright_size(image) == convert_to_rgb(image).size == (40, 90)
    assert open_crop(tmp_path / "late.png").size == (40, 90)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage that is no TIFF", b"Exif\0\0II*\0", b"Exif\0\0"])
def test_damaged_exif_leaves_the_picture_as_it_is_stored(exif: bytes, tmp_path: Path) -> None:
    make_noise(40, 90).save(tmp_path / "odd.jpg", exif=exif)
    with Image.open(tmp_path / "odd.jpg") as image:
        assert read_upright_size(image) == convert_to_rgb(image).size == (40, 90)


def test_unknown_orientation_leaves_the_picture_as_it_is_stored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    make_noise(40, 90).save(tmp_path / "odd.jpg", exif=exif)
    assert open_crop(tmp_path / "odd.jpg").size == (40, 90)


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

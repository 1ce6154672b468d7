"""Tests of chatreid_plugin.engine.image_facts: damage is named, and the facts of an image say what they should."""

from collections.abc import Callable
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageFilter

from chatreid_plugin.demo.layouts.renderer import Renderer
from chatreid_plugin.engine import image_facts
from chatreid_plugin.engine.image_facts import ImageFacts, inspect_image, inspect_images
from chatreid_plugin.errors import DataError


MakeImage = Callable[..., Path]


@pytest.fixture
def crop() -> Image.Image:
    """A synthetic person, large enough to be scaled down."""
    image, _ = Renderer("market1501").render(1, 1, 0)
    return image.resize((128, 256))


def inspect(image: Image.Image, path: Path, **options: int) -> ImageFacts:
    image.save(path, **options)
    return inspect_image(path)


def count_other_bits(first: ImageFacts, second: ImageFacts) -> int:
    """Return how many bits of two perceptual hashes differ."""
    return imagehash.hex_to_hash(first.perceptual_hash) - imagehash.hex_to_hash(second.perceptual_hash)


def test_size_and_brightness_are_those_of_the_pixels(tmp_path: Path) -> None:
    facts = inspect(Image.new("RGB", (30, 70), (200, 200, 200)), tmp_path / "grey.png")
    assert (facts.width, facts.height, facts.brightness, facts.sharpness) == (30, 70, 200.0, 0.0)


def test_dark_image_is_darker_than_a_bright_one(crop: Image.Image, tmp_path: Path) -> None:
    dark = inspect(crop.point(lambda value: value // 4), tmp_path / "dark.png")
    bright = inspect(crop.point(lambda value: 192 + value // 4), tmp_path / "bright.png")
    assert dark.brightness < 64 < 192 <= bright.brightness


def test_sharp_image_is_sharper_than_a_blurred_one(crop: Image.Image, tmp_path: Path) -> None:
    sharp = inspect(crop, tmp_path / "sharp.png")
    blurred = inspect(crop.filter(ImageFilter.GaussianBlur(6)), tmp_path / "blurred.png")
    assert sharp.sharpness > 2 * blurred.sharpness


def test_sixteen_bit_image_is_not_all_white(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 128).reshape(128, 64).astype(np.uint16)
    assert 120 < inspect(Image.fromarray(ramp), tmp_path / "infrared.png").brightness < 135


def test_content_hash_changes_with_a_byte_and_not_with_the_name(crop: Image.Image, tmp_path: Path) -> None:
    first = inspect(crop, tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "same.jpg").write_bytes(content)
    # A byte after the end of the picture: the pixels stay.
    (tmp_path / "other.png").write_bytes(content + b"\0")
    assert inspect_image(tmp_path / "same.jpg") == first
    other = inspect_image(tmp_path / "other.png")
    assert other.content_hash != first.content_hash
    assert other.perceptual_hash == first.perceptual_hash
    assert len(first.content_hash) == 32


def test_perceptual_hash_hardly_changes_when_encoded_again_and_scaled(crop: Image.Image, tmp_path: Path) -> None:
    first = inspect(crop, tmp_path / "a.png")
    again = inspect(crop.resize((64, 128)), tmp_path / "again.jpg", quality=60)
    stranger, _ = Renderer("market1501").render(2, 2, 0)
    other = inspect(stranger, tmp_path / "other.png")
    assert again.content_hash != first.content_hash
    assert len(first.perceptual_hash) == 64
    assert count_other_bits(first, again) < 26 < count_other_bits(first, other)


def test_image_cut_short_is_named(crop: Image.Image, tmp_path: Path) -> None:
    inspect(crop, tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cut\.jpg cannot be decoded: .*truncated"):
        inspect_image(tmp_path / "cut.jpg")


def test_empty_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.jpg is empty \(0 bytes\)"):
        inspect_image(tmp_path / "empty.jpg")


def test_file_that_is_no_image_and_a_broken_link_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    for name, message in (("a.jpg", "is no image that Pillow can read"), ("b.jpg", "cannot be decoded")):
        with pytest.raises(DataError, match=rf"{name} {message}"):
            inspect_image(tmp_path / name)


def test_image_larger_than_pillow_accepts_is_named(
    tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"a\.jpg cannot be decoded.*decompression bomb"):
        inspect_image(make_image(tmp_path / "a.jpg"))


def test_number_of_workers_does_not_matter(
    tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_facts, "SMALLEST_PARALLEL", 2)
    paths = [make_image(tmp_path / f"{number}.jpg", (20 + number, 40)).name for number in range(6)]
    content = (tmp_path / paths[3]).read_bytes()
    (tmp_path / paths[3]).write_bytes(content[: len(content) // 2])
    alone = inspect_images(tmp_path, paths, "own", 1)
    assert inspect_images(tmp_path, paths, "own", 2) == alone
    assert [facts.width if isinstance(facts, ImageFacts) else None for facts in alone] == [20, 21, 22, None, 24, 25]
    assert isinstance(alone[3], str) and "3.jpg cannot be decoded" in alone[3]


def test_few_images_start_no_process(tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_facts, "open_pool", lambda *rest: pytest.fail("a process was started"))
    paths = [make_image(tmp_path / f"{number}.jpg").name for number in range(3)]
    assert len(inspect_images(tmp_path, paths, "own", 2)) == 3

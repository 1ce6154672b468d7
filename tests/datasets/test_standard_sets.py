"""Tests of chatreid_plugin.datasets.standard_sets: cameras and people as the names and folders say."""

from collections.abc import Callable
from pathlib import Path

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.listing import Crop
from chatreid_plugin.datasets.standard_sets import list_cuhk01, list_cuhk02, list_occludedreid, list_viper


MakeImage = Callable[..., Path]


def test_cuhk01_has_two_images_from_each_camera(make_image: MakeImage, tmp_path: Path) -> None:
    for image in range(1, 6):
        make_image(tmp_path / "campus" / f"0971{image:03d}.png", format="PNG")
    listing = list_cuhk01(SourceSettings(name="cuhk01", root=tmp_path))
    assert [(crop.person, crop.camera) for crop in listing.crops] == [("0971", camera) for camera in "1122"]
    assert list(listing.skipped.values()) == [1]


def test_cuhk02_people_of_two_pairs_are_apart(make_image: MakeImage, tmp_path: Path) -> None:
    for pair in range(1, 6):
        make_image(tmp_path / f"P{pair}" / "cam2" / "001_0003.png", format="PNG")
    crops = list_cuhk02(SourceSettings(name="cuhk02", root=tmp_path)).crops
    assert [(crop.person, crop.camera) for crop in crops] == [
        (f"P{pair}_001", f"P{pair}_cam2") for pair in range(1, 6)
    ]
    assert {crop.split for crop in crops} == {"train"}


def test_viper_camera_is_the_folder(make_image: MakeImage, tmp_path: Path) -> None:
    make_image(tmp_path / "cam_a" / "000_45.bmp", format="BMP")
    make_image(tmp_path / "cam_b" / "000_90.bmp", format="BMP")
    assert list_viper(SourceSettings(name="viper", root=tmp_path)).crops == [
        Crop("cam_a/000_45.bmp", "train", "000", "a"),
        Crop("cam_b/000_90.bmp", "train", "000", "b"),
    ]


def test_occludedreid_has_no_training_images(make_image: MakeImage, tmp_path: Path) -> None:
    make_image(tmp_path / "occluded_body_images" / "001" / "001_01.tif", format="TIFF")
    make_image(tmp_path / "whole_body_images" / "001" / "anything.jpg")
    crops = list_occludedreid(SourceSettings(name="occludedreid", root=tmp_path)).crops
    assert [(crop.split, crop.person) for crop in crops] == [("query", "001"), ("gallery", "001")]
    assert all(crop.camera == crop.path for crop in crops)

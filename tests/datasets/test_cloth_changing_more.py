"""Tests of chatreid_plugin.datasets.cloth_changing: names, lists and what the evaluation needs of each set."""

from collections.abc import Callable
from pathlib import Path

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.cloth_changing import list_celebreid, list_deepchange, list_last, list_vcclothes
from chatreid_plugin.datasets.listing import Crop
from chatreid_plugin.demo.layouts.cloth_changing import write_celebreid_light, write_deepchange
from chatreid_plugin.errors import ConfigError, DataError


MakeImage = Callable[..., Path]


def test_celebreid_light_is_known_by_its_folder(tmp_path: Path) -> None:
    root = write_celebreid_light(tmp_path).root
    with pytest.raises(ConfigError, match=r"Celeb-reID-light is Celeb-reID-light\. Set variant: light"):
        list_celebreid(SourceSettings(name="celebreid", root=root))
    assert len(list_celebreid(SourceSettings(name="celebreid", root=root, variant="light")).crops) == 24
    assert list_celebreid(SourceSettings(name="celebreid", root=tmp_path, variant="light")).root == root


def test_celebreid_images_have_no_camera_in_common(make_image: MakeImage, tmp_path: Path) -> None:
    for path in ("train/1_1_0.jpg", "train/1_2_0.jpg", "query/1_1_0.jpg", "gallery/1_2_0.jpg"):
        make_image(tmp_path / path)
    assert list_celebreid(SourceSettings(name="celebreid", root=tmp_path)).crops == [
        Crop("train/1_1_0.jpg", "train", "1", "train/1_1_0.jpg"),
        Crop("train/1_2_0.jpg", "train", "1", "train/1_2_0.jpg"),
        Crop("query/1_1_0.jpg", "query", "test_1", "query/1_1_0.jpg"),
        Crop("gallery/1_2_0.jpg", "gallery", "test_1", "gallery/1_2_0.jpg"),
    ]


@pytest.mark.parametrize("line", ["P1_C01_1_000000.jpg", "P1_C01.jpg,3", "P1_C01_1_000000.jpg,x", "1_C01_1_0.jpg,3"])
def test_deepchange_refuses_a_line_of_another_form(tmp_path: Path, line: str) -> None:
    write_deepchange(tmp_path)
    path = tmp_path / "train-set-bbox.txt"
    path.write_text(f"{path.read_text()}\n{line}\n")
    with pytest.raises(DataError, match=r"train-set-bbox\.txt, line 26: expected <image name>,<tracklet>"):
        list_deepchange(SourceSettings(name="deepchange", root=tmp_path))


def test_deepchange_lists_may_have_more_fields(tmp_path: Path) -> None:
    write_deepchange(tmp_path)
    path = tmp_path / "test-set-query-bbox.txt"
    path.write_text("".join(f"{line},1,2,3,4\r\n" for line in path.read_text().splitlines()))
    listing = list_deepchange(SourceSettings(name="deepchange", root=tmp_path))
    assert listing.protocol["tracklets"]["test-set-query/P6_C01_1_000000.jpg"] == "26"
    assert {crop.path for crop in listing.crops if crop.split in ("query", "gallery")} == set(
        listing.protocol["tracklets"]
    )


def test_last_people_of_the_three_sets_are_apart(make_image: MakeImage, tmp_path: Path) -> None:
    name = "000001_s000123_0002_7.jpg"
    for folder in ("train/000001", "val/query", "val/gallery/000001", "test/query", "test/gallery/000001"):
        make_image(tmp_path / folder / name)
    crops = list_last(SourceSettings(name="last", root=tmp_path)).crops
    assert [(crop.split, crop.person, crop.clothes) for crop in crops] == [
        ("train", "000001", "7"),
        ("val", "val_000001", None),
        ("val", "val_000001", None),
        ("query", "test_000001", None),
        ("gallery", "test_000001", None),
    ]
    assert all(crop.camera == crop.path for crop in crops)


@pytest.mark.parametrize(("camera", "expected"), [("3", "3"), ("04", "4")])
def test_vcclothes_cameras_are_those_of_its_settings(
    make_image: MakeImage, tmp_path: Path, camera: str, expected: str
) -> None:
    for folder in ("train", "query", "gallery"):
        make_image(tmp_path / folder / f"0012-{camera}-02-05.jpg")
    listing = list_vcclothes(SourceSettings(name="vcclothes", root=tmp_path))
    assert {(crop.person, crop.camera, crop.clothes) for crop in listing.crops} == {("0012", expected, "02")}
    assert expected in listing.protocol["cross_clothes_cameras"]

"""Tests of chatreid_plugin.datasets.standard_sets: one background or several, both releases of RandPerson."""

from collections.abc import Callable
from pathlib import Path

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.listing import Crop
from chatreid_plugin.datasets.standard_sets import list_personx, list_randperson
from chatreid_plugin.errors import DataError


MakeImage = Callable[..., Path]
FOLDERS = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}


@pytest.mark.parametrize("name", ["0001_c3s1_05.jpg", "0001_c3s1_000005_00.jpg", "0001_c3_05.jpg"])
@pytest.mark.parametrize("folder", ["", "PersonX_v1", "3"])
def test_personx_is_found_in_one_background_or_in_several(
    make_image: MakeImage, tmp_path: Path, folder: str, name: str
) -> None:
    for part in FOLDERS:
        make_image(tmp_path / folder / part / name)
    crops = list_personx(SourceSettings(name="personx", root=tmp_path)).crops
    assert [(crop.split, crop.person, crop.camera) for crop in crops] == [
        (split, "0001", "3") for split in FOLDERS.values()
    ]


def test_personx_refuses_a_folder_without_backgrounds(tmp_path: Path) -> None:
    (tmp_path / "bounding_box_train").mkdir()
    with pytest.raises(DataError, match=r"holds neither bounding_box_train, .* nor a folder for each background"):
        list_personx(SourceSettings(name="personx", root=tmp_path))


def test_randperson_names_of_both_releases_are_read(make_image: MakeImage, tmp_path: Path) -> None:
    make_image(tmp_path / "new" / "000007_s01_c02_f000264.jpg")
    make_image(tmp_path / "old" / "000007_c02_s01_f000264.jpg")
    assert list_randperson(SourceSettings(name="randperson", root=tmp_path)).crops == [
        Crop("new/000007_s01_c02_f000264.jpg", "train", "000007", "s01_c02"),
        Crop("old/000007_c02_s01_f000264.jpg", "train", "000007", "s01_c02"),
    ]

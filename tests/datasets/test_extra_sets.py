"""Tests of the extra training sets' parsers on damaged layouts: leftovers, other cases, missing folders and files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.registry import list_datasets, list_source
from chatreid_plugin.demo.layouts import LAYOUTS
from chatreid_plugin.errors import DataError


# Layout -> a folder of images in it.
LISTED = {
    "pa100k": "data",
    "peta": "images",
    "rapv1": "RAP_dataset",
    "rapv2": "RAP_dataset",
    "deepchange": "train-set",
}
NAMED = {
    "celebreid:full": "Celeb-reID/train",
    "celebreid:light": "Celeb-reID-light/query",
    "last": "test/gallery/000001",
    "vcclothes": "gallery",
    "personx": "PersonX_v1/4/bounding_box_train",
    "randperson:subset": "randperson_subset",
    "randperson:full": "images/scene01/camera1_1",
    "cuhk01": "campus",
    "cuhk02": "Dataset/P1/cam1",
    "viper": "VIPeR/cam_a",
    "occludedreid": "whole_body_images/001",
}
MakeLayout = Callable[[str], SourceSettings]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes a layout once and returns its folder; nothing in it may be changed."""
    folder = tmp_path_factory.mktemp("layouts")

    def get(layout: str) -> Path:
        root = folder / layout.replace(":", "_")
        if not root.exists():
            LAYOUTS[layout](root, 0)
        return root

    return get


@pytest.fixture
def copy_layout(originals: Callable[[str], Path], tmp_path: Path) -> MakeLayout:
    """Return a function that copies a layout below a folder that looks like a label, and returns its source."""

    def copy(layout: str) -> SourceSettings:
        root = shutil.copytree(originals(layout), tmp_path / "2024_c1run" / "set")
        name, _, variant = layout.partition(":")
        return SourceSettings(name=name, root=root, variant=variant or None, allow_count_mismatch=True)

    return copy


def find_first_image(folder: Path) -> Path:
    return next(path for path in sorted(folder.iterdir()) if path.suffix != ".db")


@pytest.mark.parametrize(("layout", "folder"), (LISTED | NAMED).items())
def test_leftovers_of_other_systems_are_skipped(copy_layout: MakeLayout, layout: str, folder: str) -> None:
    source = copy_layout(layout)
    before = list_source(source)
    image = find_first_image(source.root / folder)
    leftovers = ("Thumbs.db", f"._{image.name}", ".DS_Store", f"__MACOSX/{image.name}", f"__MACOSX/._{image.name}")
    for leftover in leftovers:
        path = image.parent / leftover
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not an image")
    after = list_source(source)
    assert after.crops == before.crops
    assert len(after.crops) > 0


@pytest.mark.parametrize(("layout", "folder"), NAMED.items())
def test_upper_case_endings_are_read(copy_layout: MakeLayout, layout: str, folder: str) -> None:
    source = copy_layout(layout)
    before = list_source(source).crops
    image = find_first_image(source.root / folder)
    image.rename(image.with_name(image.stem + image.suffix.upper()))
    after = list_source(source).crops
    assert [(crop.split, crop.person, crop.clothes) for crop in after] == [
        (crop.split, crop.person, crop.clothes) for crop in before
    ]
    assert sum(crop.path.endswith(image.suffix.upper()) for crop in after) == 1


@pytest.mark.parametrize(("layout", "folder"), NAMED.items())
def test_names_of_another_form_are_counted(copy_layout: MakeLayout, layout: str, folder: str) -> None:
    source = copy_layout(layout)
    before = list_source(source)
    image = find_first_image(source.root / folder)
    # Occluded-REID's images may have any name below a person's folder.
    other = source.root / "whole_body_images" / "x" / "y.tif" if layout == "occludedreid" else image.parent / "x.jpg"
    other.parent.mkdir(exist_ok=True)
    shutil.copy(image, other)
    after = list_source(source)
    assert after.crops == before.crops
    reasons = [reason for reason in after.skipped if reason.startswith("name is not of the form")]
    assert [after.skipped[reason] for reason in reasons] == [1]


@pytest.mark.parametrize(("layout", "folder"), LISTED.items())
def test_missing_image_of_a_label_file_is_named(copy_layout: MakeLayout, layout: str, folder: str) -> None:
    source = copy_layout(layout)
    image = find_first_image(source.root / folder)
    image.unlink()
    advice = "(Copy the missing ones|Unpack that part)"
    with pytest.raises(DataError, match=rf"1 of \d+ images .* missing .*1 in {folder} .*{advice}"):
        list_source(source)


@pytest.mark.parametrize(
    ("layout", "removed", "message"),
    [
        ("pa100k", "annotation.mat", r"lacks annotation\.mat of PA-100K\. Copy what is missing"),
        ("pa100k", "data", r"lacks data of PA-100K"),
        ("peta", "PETA.mat", r"lacks PETA\.mat of PETA"),
        ("rapv1", "RAP_annotation", r"lacks RAP_annotation/RAP_annotation\.mat of RAP v1"),
        ("rapv2", "RAP_dataset", r"lacks RAP_dataset of RAP v2"),
        ("celebreid:full", "Celeb-reID/query", r"Celeb-reID lacks query of Celeb-reID"),
        ("deepchange", "val-set-query", r"lacks val-set-query of DeepChange"),
        ("deepchange", "test-set-gallery-bbox.txt", r"lacks test-set-gallery-bbox\.txt of DeepChange"),
        ("last", "val/gallery", r"lacks val/gallery of LaST"),
        ("vcclothes", "train", r"lacks train of VC-Clothes"),
        ("personx", "PersonX_v1/5/query", r"5 lacks query of PersonX"),
        ("cuhk01", "campus", r"lacks campus of CUHK01"),
        ("cuhk02", "Dataset/P5", r"Dataset lacks P5 of CUHK02"),
        ("viper", "VIPeR/cam_b", r"VIPeR lacks cam_b of VIPeR"),
        ("occludedreid", "occluded_body_images", r"lacks occluded_body_images of Occluded-REID"),
    ],
)
def test_missing_part_is_named(copy_layout: MakeLayout, layout: str, removed: str, message: str) -> None:
    source = copy_layout(layout)
    path = source.root / removed
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(DataError, match=message) as caught:
        list_source(source)
    assert "chatreid list NAME" in str(caught.value)


@pytest.mark.parametrize("name", sorted({layout.partition(":")[0] for layout in LISTED | NAMED}))
def test_missing_data_set_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"Data set folder .*nowhere does not exist"):
        list_datasets()[name].list_images(SourceSettings(name=name, root=tmp_path / "nowhere"))


@pytest.mark.parametrize("layout", NAMED)
def test_folder_without_a_matching_file_is_named(copy_layout: MakeLayout, layout: str) -> None:
    source = copy_layout(layout)
    for path in [path for path in source.root.rglob("*") if path.is_file()]:
        path.rename(path.with_name("x.gif"))
    with pytest.raises(DataError, match=r"holds no file named like \S+\."):
        list_source(source)

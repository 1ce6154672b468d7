"""Tests of chatreid_plugin.datasets.msmt17: versions, lists as labels, two name spaces, and what is missing."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.catalog import read_catalog
from chatreid_plugin.datasets.listing import Listing
from chatreid_plugin.datasets.registry import list_source
from chatreid_plugin.demo.layouts import LAYOUTS
from chatreid_plugin.errors import ConfigError, DataError


MakeSource = Callable[..., SourceSettings]
ListMsmt17 = Callable[..., Listing]


@pytest.fixture
def list_msmt17(make_source: MakeSource, tmp_path: Path) -> ListMsmt17:
    """Return a function that lists the data set below ``tmp_path``."""

    def list_it(**changes: object) -> Listing:
        return list_source(make_source(**({"name": "msmt17", "parser": None, "root": tmp_path} | changes)))

    return list_it


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write all variants once, each below a folder of its name; nothing in them may be changed."""
    root = tmp_path_factory.mktemp("msmt17")
    for variant in ("v1", "v2", "market"):
        LAYOUTS[f"msmt17:{variant}"](root / variant, 0)
    return root


@pytest.fixture
def version_1(shared: Path, tmp_path: Path) -> Path:
    """Return a copy of version 1 that a test may damage."""
    return shutil.copytree(shared / "v1" / "MSMT17_V1", tmp_path / "MSMT17_V1")


def test_train_and_test_people_of_the_same_number_are_different(list_msmt17: ListMsmt17, version_1: Path) -> None:
    crops = list_msmt17().crops
    people = {split: {crop.person for crop in crops if crop.split == split} for split in ("train", "val", "query")}
    assert people["train"] == people["val"] == {"0000", "0001", "0002"}
    assert people["query"] == {"test_0000", "test_0001", "test_0002"}
    assert {crop.camera for crop in crops} == {"01", "04", "15"}


def test_lists_are_the_labels(list_msmt17: ListMsmt17, version_1: Path) -> None:
    file = version_1 / "list_query.txt"
    first, *rest = file.read_text().splitlines()
    path = first.split()[0]
    # Another number than the folder's, a blank line and a byte order mark, as editors leave them.
    file.write_text("\ufeff" + "\n".join([f"{path}  7", "", *rest[1:]]), encoding="utf-8")
    crops = {crop.path: crop for crop in list_msmt17().crops}
    assert crops[f"test/{path}"].person == "test_0007"
    assert f"test/{rest[0].split()[0]}" not in crops


@pytest.mark.parametrize("folder", [".", "MSMT17", "MSMT17_V1/MSMT17_V1"])
def test_folders_of_other_repositories_are_found(
    list_msmt17: ListMsmt17, version_1: Path, tmp_path: Path, folder: str
) -> None:
    expected = list_msmt17().crops
    shutil.move(version_1, tmp_path / "moved")
    root = tmp_path / "data"
    (root / folder).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(tmp_path / "moved", root if folder == "." else root / folder)
    listing = list_msmt17(root=root)
    assert listing.crops == expected
    assert listing.root == root / folder


@pytest.mark.parametrize("name", ["list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt"])
def test_missing_list_is_named_and_where_it_belongs(list_msmt17: ListMsmt17, version_1: Path, name: str) -> None:
    (version_1 / name).unlink()
    with pytest.raises(DataError, match=rf"List file {name} of MSMT17.* belongs into {re.escape(str(version_1))}"):
        list_msmt17()


def test_missing_image_is_named(list_msmt17: ListMsmt17, version_1: Path) -> None:
    path = (version_1 / "list_gallery.txt").read_text().split()[0]
    (version_1 / "test" / path).unlink()
    with pytest.raises(DataError, match=rf"1 of 36 images.*1 in test/0000 \(first: test/{path}\)"):
        list_msmt17()


@pytest.mark.parametrize(
    "line",
    [
        "0000/0000_000_01_0303morning_0008_0.jpg",
        "0000/x.jpg 0",
        "0000_000_01_0303morning_0008_0.jpg 0",
        "a b c",
        "0000/../../0000_000_01_0303morning_0008_0.jpg 0",
    ],
)
def test_wrong_line_is_named(list_msmt17: ListMsmt17, version_1: Path, line: str) -> None:
    file = version_1 / "list_val.txt"
    file.write_text(f"{file.read_text()}{line}\n")
    with pytest.raises(DataError, match=rf"list_val\.txt, line 4: '{re.escape(line)}' is not of the form"):
        list_msmt17()


def test_image_listed_twice_is_named(list_msmt17: ListMsmt17, version_1: Path) -> None:
    line = (version_1 / "list_train.txt").read_text().splitlines()[0]
    file = version_1 / "list_val.txt"
    file.write_text(f"{file.read_text()}{line}\n")
    with pytest.raises(DataError, match=r"list_val\.txt, line 4: .* was listed before, in .*list_train\.txt, line 1"):
        list_msmt17()


@pytest.mark.parametrize(("written", "asked"), [("v1", "v2"), ("v2", "v1"), ("market", "v1"), ("v1", "market")])
def test_other_version_is_named(list_msmt17: ListMsmt17, shared: Path, written: str, asked: str) -> None:
    with pytest.raises(DataError, match=rf"that is MSMT17 {written}, not {asked} .*Set `variant: {written}`"):
        list_msmt17(variant=asked, root=shared / written)


def test_missing_folder_and_unknown_variant_are_named(
    list_msmt17: ListMsmt17, version_1: Path, tmp_path: Path
) -> None:
    shutil.rmtree(version_1 / "test")
    with pytest.raises(DataError, match="lacks test of MSMT17 v1"):
        list_msmt17(root=version_1)
    with pytest.raises(DataError, match="nowhere does not exist"):
        list_msmt17(root=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"unknown variant 'v3'.*v1, v2, market"):
        list_msmt17(variant="v3")


def test_copies_of_a_mac_are_not_images(list_msmt17: ListMsmt17, shared: Path, tmp_path: Path) -> None:
    shutil.copytree(shared / "v2", tmp_path, dirs_exist_ok=True)
    expected = list_msmt17(variant="v2")
    twin = tmp_path / "__MACOSX" / "MSMT17_V2" / "mask_test_v2" / "0000" / "._0000_000_01_0303morning_0008_0.jpg"
    twin.parent.mkdir(parents=True)
    twin.write_bytes(b"Mac OS X")
    listing = list_msmt17(variant="v2")
    assert len(listing.crops) == 36
    assert (listing.crops, listing.root) == (expected.crops, tmp_path / "MSMT17_V2")


def test_repack_reads_renamed_and_published_names(list_msmt17: ListMsmt17, shared: Path, tmp_path: Path) -> None:
    shutil.copytree(shared / "market", tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "query"
    for name in ("0005_000_12_0303noon_0008_0_ex.JPG", "0006_c3s1_000451_03.jpg", "0007_c3.jpg", "Thumbs.db"):
        (folder / name).write_bytes(b"")
    listing = list_msmt17(variant="market")
    crops = {crop.path: crop for crop in listing.crops}
    published = crops["query/0005_000_12_0303noon_0008_0_ex.JPG"]
    assert (published.person, published.camera, published.split) == ("test_0005", "12", "query")
    assert crops["query/0006_c3s1_000451_03.jpg"].camera == "3"
    assert listing.skipped == {"name is not of the form 0781_c11_0015.jpg": 1, "not an image file": 1}


def test_versions_have_the_same_counts() -> None:
    counts = read_catalog()["msmt17"].counts
    assert counts["v1"] == counts["v2"]
    # shared notes on protocols: the repack's train folder holds the images of both training lists.
    assert counts["v1"]["train"].images == 30248 and counts["v1"]["val"].images == 2373
    assert counts["market"]["train"].images == 30248 + 2373

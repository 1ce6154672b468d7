"""Tests of chatreid_plugin.datasets.listing: what a user is told whose folder is not what a parser looks for."""

from pathlib import Path

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.listing import Crop, Listing, check_files, check_folder, find_root
from chatreid_plugin.datasets.registry import list_source
from chatreid_plugin.demo.layouts import LAYOUTS
from chatreid_plugin.errors import DataError


@pytest.mark.parametrize("named", [".", "a", "set/a", "set/a/b"])
def test_the_folder_that_is_meant_is_named(tmp_path: Path, named: str) -> None:
    for name in ("train", "test"):
        (tmp_path / "set" / "a" / name).mkdir(parents=True)
    (tmp_path / "set" / "a" / "b").mkdir()
    root = tmp_path / "set" / named if named in (".", "a") else tmp_path / named
    if named in ("a", "set/a"):
        assert find_root(root, ["train", "test"], "Title") == root
        return
    with pytest.raises(DataError, match=rf"lacks train, test of Title\. Set `root` to {tmp_path}/set/a\.$"):
        find_root(root, ["train", "test"], "Title")


def test_what_is_missing_is_said_of_the_folder_that_has_the_rest(tmp_path: Path) -> None:
    (tmp_path / "Inner" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=rf"{tmp_path}/Inner lacks test of Title\. Copy what is missing, or set"):
        find_root(tmp_path, ["train", "test"], "Title", ["Inner"])


def test_an_archive_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "set.zip").touch()
    with pytest.raises(DataError, match=r"set\.zip is not a folder\. Unpack it"):
        check_folder(tmp_path / "set.zip")


def test_cuhk03_np_wants_the_parent_of_its_boxes(tmp_path: Path) -> None:
    root = LAYOUTS["cuhk03:detected_np"](tmp_path / "np", 0).root
    source = SourceSettings(name="cuhk03", root=root / "detected", variant="detected_np")
    with pytest.raises(DataError, match=rf"Set `root` to {root}\."):
        list_source(source)


@pytest.mark.parametrize(
    ("present", "advice"),
    [
        (["1.jpeg"], r"1\.jpeg is there instead: give the images the names that the labels have"),
        (["1.JPG"], r"1\.JPG is there instead"),
        (["2.jpg", "3.jpg"], "The folder has 2 other files. Copy the missing ones"),
        ([], "Unpack that part of the data set"),
    ],
)
def test_missing_images_are_told_from_renamed_ones(tmp_path: Path, present: list[str], advice: str) -> None:
    (tmp_path / "data").mkdir()
    for name in present:
        (tmp_path / "data" / name).touch()
    with pytest.raises(DataError, match=rf"1 in data \(first: data/1\.jpg\)\. {advice}"):
        check_files(Listing(tmp_path, [Crop("data/1.jpg", "train", "1", "1")]))


def test_renamed_images_are_not_called_unpacked(tmp_path: Path) -> None:
    root = LAYOUTS["market1501"](tmp_path / "m", 0).root
    for path in (root / "query").iterdir():
        path.rename(path.with_suffix(".jpeg"))
    with pytest.raises(DataError, match=r"no file named like 0002\S+\. It has \S+\.jpeg: do not rename"):
        list_source(SourceSettings(name="market1501", root=root, allow_count_mismatch=True))

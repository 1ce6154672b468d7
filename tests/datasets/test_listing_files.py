"""Tests of the walk of chatreid_plugin.datasets.listing: links, loops, no files, and folders nobody can read."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.listing import Crop, Listing, check_places, find_images
from chatreid_plugin.datasets.registry import list_source
from chatreid_plugin.errors import DataError


MakeSource = Callable[..., SourceSettings]


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    """Three people, and three more in a folder beside it; the files are empty, as nobody opens them here."""
    for person in range(6):
        folder = tmp_path / ("crops" if person < 3 else "elsewhere") / f"p{person}"
        folder.mkdir(parents=True)
        for camera in "ab":
            (folder / f"{camera}_0.png").touch()
    return tmp_path / "crops"


@pytest.fixture
def list_crops(make_source: MakeSource, crops: Path) -> Callable[[], Listing]:
    """Return a function that lists the folder by a pattern."""
    options = {"name": "own", "parser": "pattern", "root": crops, "pattern": "{person}/{camera}_{index}.png"}
    return lambda: list_source(make_source(**options, query_cameras=["a"]))


def list_names(folder: Path, listing: Listing) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_images(folder, listing)]


def test_linked_folders_are_read_and_said_to_lie_elsewhere(
    list_crops: Callable[[], Listing], crops: Path, tmp_path: Path
) -> None:
    for person in ("p3", "p4", "p5"):
        (crops / person).symlink_to(tmp_path / "elsewhere" / person)
    listing = list_crops()
    assert len({crop.person for crop in listing.crops}) == 6
    assert len(listing.crops) == 12
    (warning,) = listing.warnings
    assert warning.startswith("6 images lie outside the folder, through links: 2 of p3 in ")
    assert f"2 of p5 in {tmp_path}/elsewhere/p5" in warning


def test_linked_images_are_said_to_lie_elsewhere_folder_by_folder(
    list_crops: Callable[[], Listing], crops: Path, tmp_path: Path
) -> None:
    for camera in "cd":
        (crops / "p0" / f"{camera}_0.png").symlink_to(tmp_path / "elsewhere" / "p3" / "a_0.png")
    (crops / "p1" / "c_0.png").symlink_to(crops / "p1" / "a_0.png")
    assert list_crops().warnings == [
        f"2 images lie outside the folder, through links: 2 of p0 in {tmp_path}/elsewhere/p3"
    ]


def test_links_in_a_circle_end_and_are_counted(list_crops: Callable[[], Listing], crops: Path, tmp_path: Path) -> None:
    (crops / "p0" / "up").symlink_to(crops)
    (crops / "p1" / "self").symlink_to(crops / "p1" / "self")
    (crops / "all").symlink_to("/")
    (tmp_path / "elsewhere" / "back").symlink_to(crops)
    (crops / "more").symlink_to(tmp_path / "elsewhere")
    listing = list_crops()
    assert {crop.person for crop in listing.crops} == {"p0", "p1", "p2"}
    assert listing.skipped == {
        "link to a folder above it": 2,
        "not an image file": 1,
        "link to a folder that is read under another name": 1,
        "path does not match the pattern": 6,
    }


def test_links_that_multiply_are_walked_once(tmp_path: Path) -> None:
    below = tmp_path / "crops" / "9"
    below.mkdir(parents=True)
    (below / "a.png").touch()
    for level in range(8, -1, -1):
        folder = tmp_path / "crops" / str(level)
        folder.mkdir()
        for number in range(10):  # a thousand million ways down
            (folder / f"l{number}").symlink_to(tmp_path / "crops" / str(level + 1))
    assert list_names(tmp_path / "crops", Listing(tmp_path / "crops")) == ["9/a.png"]


def test_images_of_one_split_are_not_read_as_those_of_another(crops: Path) -> None:
    (crops / "p0" / "more").symlink_to(crops / "p1")
    listing = Listing(crops)
    assert list_names(crops / "p0", listing) == ["a_0.png", "b_0.png"]
    assert listing.skipped == {"link to another part of the data set": 1}
    (crops / "p3").symlink_to(crops / "p2")  # the folder that is asked for may itself be a link
    assert list_names(crops / "p3", Listing(crops)) == ["a_0.png", "b_0.png"]


def test_a_folder_has_its_own_name_before_that_of_a_link(crops: Path) -> None:
    (crops / "a_link").symlink_to(crops / "p2")
    names = list_names(crops, Listing(crops))
    assert names == [f"p{person}/{camera}_0.png" for person in range(3) for camera in "ab"]


def test_what_is_no_file_is_counted_and_never_opened(list_crops: Callable[[], Listing], crops: Path) -> None:
    os.mkfifo(crops / "p0" / "c_0.png")
    (crops / "p0" / "d_0.png").symlink_to("/dev/zero")
    (crops / "p0" / "e_0.png").symlink_to("nowhere.png")
    (crops / "p0" / "f_0.png").symlink_to("f_0.png")
    (crops / "p0" / os.fsdecode(b"g\xff_0.png")).touch()
    listing = list_crops()
    assert len(listing.crops) == 6
    assert listing.skipped == {
        "pipe or device, not a file": 2,
        "link to a missing file": 1,
        "file that cannot be read (Too many levels of symbolic links)": 1,
        "name is not UTF-8": 1,
    }


def test_folders_that_cannot_be_read_are_counted(
    list_crops: Callable[[], Listing], crops: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("p1"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_crops()
    assert {crop.person for crop in listing.crops} == {"p0", "p2"}
    assert listing.skipped == {"folder that cannot be read (Permission denied)": 1}


def test_folders_too_deep_to_name_are_counted(crops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(crops)
    for _ in range(20):  # longer than the 4,096 bytes of a path on Linux
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    listing = Listing(crops)
    assert len(list_names(crops, listing)) == 6
    assert listing.skipped == {"folder that cannot be read (File name too long)": 1}


@pytest.mark.parametrize("path", ["../elsewhere/p3/a_0.png", "p0/../../elsewhere/p3/a_0.png", "/etc/a.png", "a\0.png"])
def test_labels_that_leave_the_folder_are_refused(crops: Path, path: str) -> None:
    listing = Listing(crops, [Crop(path, "train", "1", "1")])
    with pytest.raises(DataError, match="does not lie below that folder"):
        check_places(listing)

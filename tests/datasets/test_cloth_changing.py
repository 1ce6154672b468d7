"""Tests of chatreid_plugin.datasets.cloth_changing: LTCC and PRCC, outfits, lists, roles of cameras, and leftovers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.listing import Listing
from chatreid_plugin.datasets.registry import list_source
from chatreid_plugin.demo.layouts import LAYOUTS
from chatreid_plugin.errors import DataError


MakeSource = Callable[..., SourceSettings]
ListData = Callable[..., Listing]


@pytest.fixture
def list_data(make_source: MakeSource, tmp_path: Path) -> ListData:
    """Return a function that lists a data set below ``tmp_path``."""

    def list_it(name: str, root: Path = tmp_path) -> Listing:
        return list_source(make_source(name=name, parser=None, root=root))

    return list_it


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write both data sets once; nothing in them may be changed."""
    root = tmp_path_factory.mktemp("clothes")
    for name in ("ltcc", "prcc"):
        LAYOUTS[name](root, 0)
    return root


@pytest.fixture
def ltcc(shared: Path, tmp_path: Path) -> Path:
    """Return a copy of LTCC that a test may damage."""
    return shutil.copytree(shared / "LTCC_ReID", tmp_path / "LTCC_ReID")


@pytest.fixture
def prcc(shared: Path, tmp_path: Path) -> Path:
    """Return a copy of PRCC that a test may damage."""
    return shutil.copytree(shared / "prcc", tmp_path / "prcc")


def test_ltcc_outfits_belong_to_their_person(list_data: ListData, ltcc: Path) -> None:
    outfits: dict[str, set[str | None]] = {}
    for crop in list_data("ltcc").crops:
        outfits.setdefault(crop.person, set()).add(crop.clothes)
    assert outfits == {
        "001": {"001_1", "001_2"},
        "007": {"007_1"},
        "022": {"022_1", "022_2", "022_3"},
        "031": {"031_1", "031_2"},
        "094": {"094_1"},
    }


def test_ltcc_parent_folder_is_not_read(list_data: ListData, ltcc: Path, tmp_path: Path) -> None:
    expected = list_data("ltcc").crops
    root = tmp_path / "my_cache_c3" / "001_9_c7"
    root.parent.mkdir()
    shutil.move(ltcc, root)
    assert list_data("ltcc", root).crops == expected
    assert len({crop.clothes for crop in expected}) == 9


def test_ltcc_leftovers_are_skipped_and_upper_case_is_read(list_data: ListData, ltcc: Path) -> None:
    path = sorted((ltcc / "query").iterdir())[0]
    path.rename(path.with_suffix(".PNG"))
    for name in ("Thumbs.db", "._022_1_c1_000001.png", "__MACOSX/022_1_c1_000001.png", "22_1_c1_000001.png"):
        (ltcc / "query" / name).parent.mkdir(exist_ok=True)
        (ltcc / "query" / name).write_bytes(b"")
    listing = list_data("ltcc")
    assert f"query/{path.stem}.PNG" in {crop.path for crop in listing.crops}
    assert sum(crop.split == "query" for crop in listing.crops) == 18
    assert listing.skipped == {"not an image file": 2, "name is not of the form 094_1_c9_015833.png": 1}


@pytest.mark.parametrize("folder", ["train", "query", "test", "info"])
def test_ltcc_missing_folder_is_named(list_data: ListData, ltcc: Path, folder: str) -> None:
    shutil.rmtree(ltcc / folder)
    with pytest.raises(DataError, match=rf"lacks {folder} of LTCC\. Copy what is missing, or set `root`"):
        list_data("ltcc", ltcc)


def test_ltcc_missing_list_is_named(list_data: ListData, ltcc: Path) -> None:
    (ltcc / "info" / "cloth-change_id_test.txt").unlink()
    with pytest.raises(DataError, match=r"List file .*info/cloth-change_id_test\.txt is missing"):
        list_data("ltcc")


def test_ltcc_wrong_line_of_a_list_is_named(list_data: ListData, ltcc: Path) -> None:
    (ltcc / "info" / "cloth-change_id_train.txt").write_text("1\n\n1.5\n")
    with pytest.raises(DataError, match=r"cloth-change_id_train\.txt, line 3: '1\.5' is not the number of a person"):
        list_data("ltcc")


def test_ltcc_list_may_name_people_that_have_no_image(list_data: ListData, ltcc: Path) -> None:
    (ltcc / "info" / "cloth-change_id_test.txt").write_text("22\n151\n")
    listing = list_data("ltcc")
    assert listing.protocol["cloth_change_test_people"] == ["022", "151"]
    assert "info/cloth-change_id_test.txt names 1 people without an image (first: 151)" in listing.warnings


def test_prcc_roles_of_the_cameras(list_data: ListData, prcc: Path) -> None:
    crops = list_data("prcc").crops
    tested = {(crop.camera, crop.split, crop.clothes) for crop in crops if "/test/" in crop.path}
    assert tested == {("A", "gallery", "1"), ("B", "query", "1"), ("C", "query", "2")}
    trained = {(crop.camera, crop.clothes) for crop in crops if crop.split in ("train", "val")}
    assert trained == {("A", "1"), ("B", "1"), ("C", "2")}
    assert not any(crop.path.startswith("sketch") for crop in crops)


def test_prcc_parent_folder_is_not_read(list_data: ListData, prcc: Path, tmp_path: Path) -> None:
    expected = list_data("prcc").crops
    root = tmp_path / "2024_c1run" / "C" / "009"
    root.parent.mkdir(parents=True)
    shutil.move(prcc, root)
    assert list_data("prcc", root).crops == expected


def test_prcc_leftovers_are_skipped_and_upper_case_is_read(list_data: ListData, prcc: Path) -> None:
    path = sorted((prcc / "rgb" / "test" / "B" / "003").iterdir())[0]
    path.rename(path.with_suffix(".JPG"))
    for name in (
        "test/A/Thumbs.db",
        "test/A/003/._x.jpg",
        "test/A/x.jpg",
        "train/001/D_x.jpg",
        "val/__MACOSX/A_x.jpg",
    ):
        (prcc / "rgb" / name).parent.mkdir(exist_ok=True)
        (prcc / "rgb" / name).write_bytes(b"")
    listing = list_data("prcc")
    assert len(listing.crops) == 5 * 3 * 3
    assert f"rgb/test/B/003/{path.stem}.JPG" in {crop.path for crop in listing.crops}
    assert listing.skipped == {
        "not an image file": 2,
        "name is not of the form A/003/cropped_rgb001.jpg": 1,
        "name is not of the form 001/A_cropped_rgb370.jpg": 1,
    }


@pytest.mark.parametrize("folder", ["rgb/train", "rgb/val", "rgb/test/A", "rgb/test/C"])
def test_prcc_missing_folder_is_named(list_data: ListData, prcc: Path, folder: str) -> None:
    shutil.rmtree(prcc / folder)
    with pytest.raises(DataError, match=rf"lacks {folder} of PRCC"):
        list_data("prcc", prcc)


def test_prcc_empty_folder_is_named(list_data: ListData, prcc: Path) -> None:
    shutil.rmtree(prcc / "rgb" / "test" / "B")
    (prcc / "rgb" / "test" / "B").mkdir()
    with pytest.raises(DataError, match=r"rgb/test/B holds no file named like A/003/cropped_rgb001\.jpg"):
        list_data("prcc")

"""CUHK-PEDES, ICFG-PEDES, RSTPReid, UFine6926: label files are known by their fields; wrong records are refused."""

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.listing import Listing
from chatreid_plugin.datasets.registry import list_datasets
from chatreid_plugin.errors import DataError


def make_record(path: str = "cam_a/1.jpg", **changes: Any) -> dict[str, Any]:
    record = {"split": "train", "captions": ["A man.", "He walks."], "file_path": path, "id": 1}
    return record | changes


def write_labels(root: Path, value: Any, name: str = "reid_raw.json") -> Path:
    """Write a label file and empty files for the images that it names: no parser opens them."""
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(value), encoding="utf-8")
    for record in value if isinstance(value, list) else []:
        path = record.get("file_path", record.get("img_path")) if isinstance(record, dict) else None
        if isinstance(path, str) and ".." not in path and not path.startswith("/"):
            (root / "imgs" / path).parent.mkdir(parents=True, exist_ok=True)
            (root / "imgs" / path).touch()
    return root


def list_crops(root: Path, name: str = "cuhkpedes") -> Listing:
    return list_datasets()[name].list_images(SourceSettings(name=name, root=root))


def test_test_images_are_the_gallery_and_carry_their_captions(tmp_path: Path) -> None:
    splits = ["train", "val", "test", "Train"]
    records = [make_record(f"{number}.jpg", split=split, id=number % 3) for number, split in enumerate(splits)]
    listing = list_crops(write_labels(tmp_path, records))
    assert [crop.split for crop in listing.crops] == ["train", "val", "gallery", "train"]
    assert listing.crops[2].captions == ("A man.", "He walks.")
    assert [crop.camera for crop in listing.crops] == [crop.path for crop in listing.crops]


def test_numbers_as_texts_are_the_same_identity(tmp_path: Path) -> None:
    records = [make_record("1.jpg", id=7), make_record("2.jpg", id="7"), make_record("3.jpg", id="007")]
    assert {crop.person for crop in list_crops(write_labels(tmp_path, records)).crops} == {"7"}


def test_numbers_of_tables_are_the_same_identity(tmp_path: Path) -> None:
    records = [make_record("1.jpg", id=7.0), make_record("2.jpg", id="7.0"), make_record("3.jpg", id=7)]
    assert {crop.person for crop in list_crops(write_labels(tmp_path, records)).crops} == {"7"}


def test_junk_is_nobody(tmp_path: Path) -> None:
    records = [make_record("1.jpg"), *(make_record(f"{junk}.jpg", id=junk) for junk in (-1, "-1", -1.0))]
    listing = list_crops(write_labels(tmp_path, records))
    assert ([crop.person for crop in listing.crops], listing.skipped) == (["1"], {"junk (identity -1)": 3})


def test_byte_order_mark_is_no_part_of_the_labels(tmp_path: Path) -> None:
    root = write_labels(tmp_path, [make_record()])
    file = root / "reid_raw.json"
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert len(list_crops(root).crops) == 1


def test_empty_captions_keep_the_numbers_of_the_tested_ones(tmp_path: Path) -> None:
    captions = ["one", " ", "three"]
    records = [make_record(f"{split}.jpg", split=split, id=split, captions=captions) for split in ("train", "test")]
    listing = list_crops(write_labels(tmp_path, records))
    assert [crop.captions for crop in listing.crops] == [("one", "three"), ("one", "", "three")]
    assert listing.skipped == {"empty caption": 2}


def test_label_file_is_found_by_its_fields(tmp_path: Path) -> None:
    write_labels(tmp_path, [{"id": 1, "file_path": "1.jpg", "captions": ["A man."]}], "caption_all.json")
    write_labels(tmp_path, {"note": "no list"}, "notes.json")
    write_labels(tmp_path, [make_record()], "my labels.json")
    write_labels(tmp_path, [make_record()], "._my labels.json")
    (tmp_path / "__MACOSX").mkdir()
    assert [crop.path for crop in list_crops(tmp_path).crops] == ["imgs/cam_a/1.jpg"]


def test_published_name_goes_before_other_lists(tmp_path: Path) -> None:
    write_labels(tmp_path, [make_record("2.jpg")], "augmented.json")
    write_labels(tmp_path, [make_record("1.jpg")])
    assert [crop.path for crop in list_crops(tmp_path).crops] == ["imgs/1.jpg"]


def test_several_label_files_are_refused(tmp_path: Path) -> None:
    write_labels(tmp_path, [make_record()], "a.json")
    write_labels(tmp_path, [make_record()], "b.json")
    with pytest.raises(DataError, match=r"may label CUHK-PEDES: .*a\.json, .*b\.json\. Name the .*`labels`"):
        list_crops(tmp_path)
    source = SourceSettings(name="cuhkpedes", root=tmp_path, labels=tmp_path / "b.json")
    assert len(list_datasets()["cuhkpedes"].list_images(source).crops) == 1


@pytest.mark.parametrize("name", ["caption_all.json", "reid_raw.json"])
def test_labels_without_split_are_refused_under_any_name(tmp_path: Path, name: str) -> None:
    write_labels(tmp_path, [{"id": 1, "file_path": "1.jpg", "captions": ["A man."]}], name)
    with pytest.raises(DataError, match=rf"{name}, record 1: `split` missing .* renaming it does not help"):
        list_crops(tmp_path)


def test_folder_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no label file of CUHK-PEDES \(reid_raw\.json\) .* There is no JSON file"):
        list_crops(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        list_crops(tmp_path / "missing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", r"reid_raw\.json is not valid JSON"),
        ("", r"reid_raw\.json is not valid JSON"),
        ('{"split": "train"}', r"reid_raw\.json must hold a JSON list of records, found an object"),
        ("[]", r"reid_raw\.json is an empty list"),
        ('["train"]', r"reid_raw\.json, record 1: expected an object, found a text"),
    ],
)
def test_wrong_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "reid_raw.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list_crops(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "testing"}, "`split` must be train, val or test, found 'testing'"),
        ({"split": 1}, "`split` must be train, val or test, found 1"),
        ({"captions": 5}, "`captions` must be a list of texts, found a number"),
        ({"captions": ["A man.", None]}, "`captions` must be a list of texts, found a list"),
        ({"id": None}, "`id` must be a number or a text that is not empty, found null"),
        ({"id": True}, "`id` must be .*, found true or false"),
        ({"id": 1.5}, "`id` must be .*, found a number"),
        ({"id": " "}, "`id` must be .*, found a text"),
        ({"file_path": ["1.jpg"]}, "`file_path` must be an image path, found a list"),
        ({"file_path": "/data/1.jpg"}, "does not lie below the data set folder"),
        ({"file_path": "../1.jpg"}, "does not lie below the data set folder"),
    ],
)
def test_wrong_record_is_refused_with_its_number(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_labels(tmp_path, [make_record("1.jpg"), make_record("2.jpg", **changes)])
    with pytest.raises(DataError, match=rf"reid_raw\.json, record 2: .*{message}"):
        list_crops(tmp_path)


def test_missing_field_is_named(tmp_path: Path) -> None:
    record = make_record("2.jpg")
    del record["captions"]
    write_labels(tmp_path, [make_record("1.jpg"), record])
    with pytest.raises(DataError, match=r"record 2: `captions` missing \(found: split, file_path, id\)"):
        list_crops(tmp_path)


def test_empty_captions_are_dropped_and_counted(tmp_path: Path) -> None:
    records = [make_record("1.jpg", captions=["", " A man. ", "\n"]), make_record("2.jpg", captions=[])]
    listing = list_crops(write_labels(tmp_path, records))
    assert [crop.captions for crop in listing.crops] == [("A man.",), ()]
    assert listing.skipped == {"empty caption": 2}


def test_identity_in_two_splits_is_refused(tmp_path: Path) -> None:
    write_labels(tmp_path, [make_record("1.jpg"), make_record("2.jpg", split="test", id="1")])
    with pytest.raises(DataError, match=r"record 2: identity 1 is in split gallery here and in train before"):
        list_crops(tmp_path)


def test_captions_of_an_image_named_twice_are_joined(tmp_path: Path) -> None:
    listing = list_crops(write_labels(tmp_path, [make_record(), make_record(captions=["Again."])]))
    assert [crop.captions for crop in listing.crops] == [("A man.", "He walks.", "Again.")]
    assert listing.skipped == {"record of an image named before (captions joined)": 1}


def test_image_of_two_identities_is_refused(tmp_path: Path) -> None:
    write_labels(tmp_path, [make_record(), make_record(id=2)])
    with pytest.raises(DataError, match=r"record 2: imgs/cam_a/1\.jpg is identity 2 here and 1 before"):
        list_crops(tmp_path)


def test_missing_images_are_counted_by_folder(tmp_path: Path) -> None:
    paths = ["cam_a/1.jpg", "cam_a/2.jpg", "Market/1.jpg", "CUHK03/1.jpg"]
    write_labels(tmp_path, [make_record(path) for path in paths])
    for path in paths[:3]:
        (tmp_path / "imgs" / path).unlink()
    with pytest.raises(DataError, match="3 of 4 images .* 2 in imgs/cam_a, 1 in imgs/Market .* Unpack"):
        list_crops(tmp_path)


def test_images_may_lie_beside_the_labels(tmp_path: Path) -> None:
    write_labels(tmp_path, [make_record("images/1.jpg")])
    (tmp_path / "imgs").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "images").rename(tmp_path / "images")
    assert [crop.path for crop in list_crops(tmp_path, "ufine6926").crops] == ["images/1.jpg"]


@pytest.mark.parametrize(
    ("name", "path", "camera"),
    [
        ("icfgpedes", "test/0627/0627_010_05_0303afternoon_1591_0.jpg", "05"),
        ("icfgpedes", "train/0001/0001_000_15_0114noon_0017_2_ex.JPG", "15"),
        ("icfgpedes", "test/0627/other.jpg", "imgs/test/0627/other.jpg"),
        ("rstpreid", "0000_c14_0031.jpg", "14"),
        ("rstpreid", "0000_c1_0004.jpg", "1"),
        ("rstpreid", "copy_0000_c14_0031.jpg", "imgs/copy_0000_c14_0031.jpg"),
        ("rstpreid", "2024_c1run/0000.jpg", "imgs/2024_c1run/0000.jpg"),
        ("cuhkpedes", "Market/0000_c14_0031.jpg", "imgs/Market/0000_c14_0031.jpg"),
    ],
)
def test_camera_is_read_from_the_file_name_alone(tmp_path: Path, name: str, path: str, camera: str) -> None:
    record = {key: value for key, value in make_record().items() if key != "file_path"}
    root = write_labels(tmp_path / "2024_c1run", [record | {"img_path": path}], "labels.json")
    assert [crop.camera for crop in list_crops(root, name).crops] == [camera]

"""Tests of chatreid_plugin.datasets.market1501: Market-1501's layout, its published counts, and leftovers in it."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets import catalog
from chatreid_plugin.datasets.registry import list_source
from chatreid_plugin.demo.world import FILE_NAME, WorldSummary
from chatreid_plugin.engine.manifests import parse_source
from chatreid_plugin.errors import DataError


MakeSource = Callable[..., SourceSettings]

SPLITS = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}


def list_expected(root: Path) -> dict[str, tuple[str, str, str]]:
    """Return path -> (split, person, camera) of every image the generator wrote, junk left out."""
    expected: dict[str, tuple[str, str, str]] = {}
    for folder, split in SPLITS.items():
        for path in (root / folder).iterdir():
            match = FILE_NAME.match(path.name)
            assert match is not None
            if match["pid"] != "-1":
                expected[f"{folder}/{path.name}"] = (split, match["pid"], match["cam"])
    return expected


def test_gives_exactly_what_the_generator_wrote(
    make_source: MakeSource, world: Path, shared_world: WorldSummary
) -> None:
    report = parse_source(make_source())
    found = {
        record.path: (record.split, record.person_id.removeprefix("market1501:"), record.camera_id)
        for record in report.records
    }
    assert found == list_expected(world)
    assert Counter(record.split for record in report.records) == {
        "train": shared_world.train_images,
        "query": shared_world.query_images,
        "gallery": shared_world.gallery_images - shared_world.junk,
    }
    assert sum(record.person_id == "market1501:0000" for record in report.records) == shared_world.distractors
    assert report.skipped["junk (identity -1)"] == shared_world.junk
    assert report.root == world
    assert [record.path for record in report.records] == sorted(found)


def test_records_know_their_size_and_name(make_source: MakeSource, world: Path) -> None:
    for record in parse_source(make_source(name="mine")).records:
        with Image.open(world / record.path) as image:
            assert (record.width, record.height) == image.size
        assert record.image_id == f"mine/{record.path}"
        assert (record.dataset, record.person_id.split(":")[0], record.modality) == ("mine", "mine", "visible")


def test_other_counts_than_published_are_refused_unless_allowed(make_source: MakeSource, world: Path) -> None:
    message = r"split train has 48 images, Market-1501 has 12936.*allow_count_mismatch"
    with pytest.raises(DataError, match=message):
        list_source(make_source(allow_count_mismatch=False))
    warnings = list_source(make_source()).warnings
    # The distractors' identity 0000 is none of the gallery's three.
    expected = ["48 images", "8 identities", "6 images", "3 identities", "17 images", "3 identities"]
    assert len(warnings) == len(expected)
    assert all(number in warning for number, warning in zip(expected, warnings, strict=True))


def test_published_counts_pass(make_source: MakeSource, monkeypatch: pytest.MonkeyPatch, world: Path) -> None:
    counts = {
        "train": catalog.Count(images=48, identities=8, confidence="V"),
        "query": catalog.Count(images=6, identities=3, confidence="V"),
        "gallery": catalog.Count(images=17, identities=3, confidence="P"),
    }
    entry = catalog.read_catalog()["market1501"].model_copy(update={"counts": {"default": counts}})
    monkeypatch.setattr(catalog, "read_catalog", lambda: {"market1501": entry})
    assert list_source(make_source(allow_count_mismatch=False)).warnings == []


def test_published_counts_are_those_of_the_label_files() -> None:
    # shared notes on protocols: 13,115 images of 750 identities and 2,798 distractors; 3,819 junk are left out.
    counts = catalog.read_catalog()["market1501"].counts["default"]
    assert {split: (count.images, count.identities) for split, count in counts.items()} == {
        "train": (12936, 751),
        "query": (3368, 750),
        "gallery": (13115 + 2798, 750),
    }
    assert {count.confidence for count in counts.values()} == {"V"}


def test_missing_data_set_is_named(make_source: MakeSource, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Data set folder .*nowhere does not exist"):
        list_source(make_source(root=tmp_path / "nowhere"))


def test_missing_folder_is_named(make_source: MakeSource, world: Path) -> None:
    shutil.rmtree(world / "query")
    with pytest.raises(DataError, match=r"lacks query of Market-1501\. Copy what is missing, or set `root`"):
        list_source(make_source())


@pytest.mark.parametrize("rename", [None, "person{}.jpg"])
def test_folder_without_a_matching_file_is_named(make_source: MakeSource, world: Path, rename: str | None) -> None:
    for number, path in enumerate(sorted((world / "query").iterdir())):
        if rename is None:
            path.unlink()
        else:
            path.rename(path.with_name(rename.format(number)))
    with pytest.raises(DataError, match=r"query holds no file named like 0002_c1s1_000451_03\.jpg"):
        list_source(make_source())


def test_version_folder_is_found_and_is_the_root(make_source: MakeSource, world: Path, tmp_path: Path) -> None:
    expected = list_expected(world)
    inner = tmp_path / "outer" / "Market-1501-v15.09.15"
    inner.parent.mkdir()
    world.rename(inner)
    report = parse_source(make_source(root=tmp_path / "outer", captions=inner / "captions.jsonl"))
    assert report.root == inner
    assert {record.path for record in report.records} == set(expected)


def test_camera_is_read_from_the_file_name_alone(make_source: MakeSource, world: Path, tmp_path: Path) -> None:
    expected = list_expected(world)
    (tmp_path / "2024_c1run").mkdir()
    root = world.rename(tmp_path / "2024_c1run" / "0007_c5s1")
    crops = list_source(make_source(root=root)).crops
    assert {crop.path: crop.camera for crop in crops} == {path: item[2] for path, item in expected.items()}
    assert len({crop.camera for crop in crops}) == 3


def test_leftovers_of_other_systems_are_skipped(make_source: MakeSource, world: Path) -> None:
    expected = list_expected(world)
    folder = world / "bounding_box_train"
    name = sorted(folder.iterdir())[0].name
    for leftover in ("Thumbs.db", f"._{name}", ".DS_Store", f"__MACOSX/{name}", f"__MACOSX/._{name}", f".x/{name}"):
        (folder / leftover).parent.mkdir(exist_ok=True)
        (folder / leftover).write_bytes(b"not an image")
    listing = list_source(make_source())
    assert {crop.path for crop in listing.crops} == set(expected)
    assert listing.skipped["not an image file"] == 3


def test_names_of_another_form_are_counted(make_source: MakeSource, world: Path) -> None:
    folder = world / "bounding_box_train"
    names = sorted(path.name for path in folder.iterdir())
    for number, wrong in enumerate(("x_" + names[0], "0001_c7s1_000001_00.jpg", "001_c1s1_000001_00.jpg", "a.png")):
        (folder / names[number]).rename(folder / wrong)
    listing = list_source(make_source())
    assert listing.skipped["name is not of the form 0002_c1s1_000451_03.jpg"] == 4
    assert sum(crop.split == "train" for crop in listing.crops) == len(names) - 4


def test_upper_case_ending_is_accepted(make_source: MakeSource, world: Path) -> None:
    count = len(list_expected(world))
    for path in list((world / "query").iterdir()):
        path.rename(path.with_suffix(".JPG"))
    assert len(parse_source(make_source()).records) == count

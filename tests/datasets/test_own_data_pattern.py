"""Tests of chatreid_plugin.datasets.own_data: any folder of crops, split by identity."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.own_data import compile_pattern
from chatreid_plugin.datasets.registry import list_source
from chatreid_plugin.engine.inspect import SPLITS
from chatreid_plugin.engine.manifests import parse_source
from chatreid_plugin.errors import ConfigError, DataError


MakeSource = Callable[..., SourceSettings]
MakeImage = Callable[..., Path]

PATTERN = "{person}/{camera}_{index}.png"


@pytest.fixture
def crops(tmp_path: Path, make_image: MakeImage) -> Path:
    """Six people in three cameras, two images each; JPEG data in files called .png."""
    for person in range(6):
        for camera in "abc":
            for index in range(2):
                make_image(tmp_path / "crops" / f"p{person}" / f"{camera}_{index}.png", (20 + person, 50))
    return tmp_path / "crops"


def test_pattern_reads_any_folder(make_source: MakeSource, crops: Path) -> None:
    report = parse_source(make_source(name="own", parser="pattern", root=crops, pattern=PATTERN))
    assert len(report.records) == 6 * 3 * 2
    assert report.root == crops
    record = report.records[7]
    assert (record.path, record.person_id, record.camera_id) == ("p1/a_1.png", "own:p1", "a")
    assert (record.width, record.height, record.clothes_id) == (21, 50, None)
    assert [item.path for item in report.records] == sorted(item.path for item in report.records)


@pytest.mark.parametrize(("share", "training"), [(0.0, 0), (0.34, 2), (0.5, 3), (1.0, 6)])
def test_identities_are_never_in_two_splits(make_source: MakeSource, crops: Path, share: float, training: int) -> None:
    source = make_source(parser="pattern", root=crops, pattern=PATTERN, train_share=share, query_cameras=["b"])
    records = parse_source(source).records
    trained = {record.person_id for record in records if record.split == "train"}
    assert len(trained) == training
    assert trained.isdisjoint(record.person_id for record in records if record.split != "train")
    for record in records:
        if record.split != "train":
            assert record.split == ("query" if record.camera_id == "b" else "gallery")


def test_missing_query_cameras_are_a_warning_that_lists_the_cameras(make_source: MakeSource, crops: Path) -> None:
    warnings = parse_source(make_source(parser="pattern", root=crops, pattern=PATTERN)).warnings
    assert warnings == ["no query images: set query_cameras (cameras found: a, b, c) to evaluate"]
    source = make_source(parser="pattern", root=crops, pattern=PATTERN, query_cameras=["a", "b", "c"])
    assert parse_source(source).warnings[0].startswith("no gallery images")
    source = make_source(parser="pattern", root=crops, pattern=PATTERN, query_cameras=["a", "d"])
    assert parse_source(source).warnings == ["query_cameras names d, which no image has (cameras found: a, b, c)"]
    assert parse_source(make_source(parser="pattern", root=crops, pattern=PATTERN, train_share=1)).warnings == []


def test_first_images_of_each_person_ask_when_cameras_are_unknown(make_source: MakeSource, crops: Path) -> None:
    options = {"name": "own", "parser": "pattern", "root": crops, "pattern": "{person}/{rest}.png"}
    report = parse_source(make_source(**options, queries_per_person=2))
    asked = [record.path for record in report.records if record.split == "query"]
    assert asked == [f"p{person}/a_{index}.png" for person in (3, 4, 5) for index in (0, 1)]
    assert len([record for record in report.records if record.split == "gallery"]) == 3 * 4
    (warning,) = [text for text in parse_source(make_source(**options)).warnings if "query" in text]
    assert "set queries_per_person, e.g. 1, to evaluate" in warning


def test_queries_chosen_in_two_ways_are_refused(make_source: MakeSource, crops: Path) -> None:
    source = make_source(
        name="own", parser="pattern", root=crops, pattern=PATTERN, query_cameras=["a"], queries_per_person=1
    )
    with pytest.raises(ConfigError, match="query_cameras and queries_per_person; set one of them"):
        parse_source(source)


def test_without_a_camera_every_image_is_a_camera_of_its_own(make_source: MakeSource, crops: Path) -> None:
    records = parse_source(make_source(parser="pattern", root=crops, pattern="{person}/{image}.png")).records
    assert len({record.camera_id for record in records}) == len(records) == 36


def test_pattern_reads_clothes_and_literal_text(
    make_source: MakeSource, tmp_path: Path, make_image: MakeImage
) -> None:
    make_image(tmp_path / "own" / "a+b (1)" / "7.c3-o2.jpeg")
    source = make_source(parser="pattern", root=tmp_path / "own", pattern="a+b (1)/{person}.c{camera}-o{clothes}.jpeg")
    (record,) = parse_source(source).records
    assert (record.person_id, record.camera_id, record.clothes_id) == ("market1501:7", "3", "2")


def test_fields_never_cross_a_folder_and_take_the_shortest_text() -> None:
    expression = compile_pattern("{person}_{camera}.jpg")
    match = expression.fullmatch("1_2_3.jpg")
    assert match is not None and match.groupdict() == {"person": "1", "camera": "2_3"}
    assert expression.fullmatch("a/1_2.jpg") is None
    assert expression.fullmatch("1_2.jpg.jpg\n") is None
    assert expression.fullmatch("_2.jpg") is None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{camera}_{index}.png", "must name {person}"),
        ("{person}/{person}.png", "each field once"),
        ("{Person}.png", r"unknown field {Person}\. Did you mean {person}\?"),
        ("{person}/{Camera}.png", r"unknown field {Camera}\. Did you mean {camera}\?"),
        (
            "{pid}/{camera}.png",
            r"unknown field {pid}\. Did you mean {person}\? Labels are .*{split}; ignored are {index}",
        ),
        ("{person}/{day}_{camera}.png", "unknown field {day}.*such as {_day}"),
        ("{person}/{camera.png", "a brace is open"),
    ],
)
def test_wrong_pattern_is_a_configuration_error(
    make_source: MakeSource, crops: Path, pattern: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_source(make_source(parser="pattern", root=crops, pattern=pattern))


def test_pattern_that_matches_nothing_shows_a_file(make_source: MakeSource, crops: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"matches the pattern.*'p0/a_0\.png' does not match"):
        parse_source(make_source(parser="pattern", root=crops, pattern="{person}/{camera}.tif"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="It holds no image files"):
        parse_source(make_source(parser="pattern", root=tmp_path / "empty", pattern=PATTERN))
    with pytest.raises(DataError, match="Data set folder .*none does not exist"):
        parse_source(make_source(parser="pattern", root=tmp_path / "none", pattern=PATTERN))


def test_files_that_do_not_match_are_counted(make_source: MakeSource, crops: Path, make_image: MakeImage) -> None:
    make_image(crops / "cover.png")
    report = parse_source(make_source(parser="pattern", root=crops, pattern=PATTERN))
    assert report.skipped == {"path does not match the pattern": 1}
    assert len(report.records) == 36


def test_pattern_is_needed(make_source: MakeSource, crops: Path) -> None:
    with pytest.raises(ConfigError, match="Source own needs `pattern`, e.g."):
        parse_source(make_source(name="own", parser="pattern", root=crops))


@pytest.fixture
def split_crops(tmp_path: Path) -> Path:
    """Two people who train, two who are tested, and junk; the files are empty, as nobody opens them here."""
    for split, people in (("bounding_box_train", "01"), ("query", "23"), ("bounding_box_test", ("2", "3", "-1"))):
        for person in people:
            for camera in "ab":
                path = tmp_path / "split" / split / f"{person}_{camera}_0.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    return tmp_path / "split"


SPLIT_PATTERN = "{split}/{person}_{camera}_{index}.png"


def test_split_of_the_path_is_kept(make_source: MakeSource, split_crops: Path) -> None:
    listing = list_source(make_source(name="own", parser="pattern", root=split_crops, pattern=SPLIT_PATTERN))
    people = {split: {crop.person for crop in listing.crops if crop.split == split} for split in SPLITS}
    assert people == {"train": {"0", "1"}, "val": set(), "query": {"2", "3"}, "gallery": {"2", "3"}}
    assert (listing.skipped, listing.warnings) == ({"junk (identity -1)": 2}, [])


@pytest.mark.parametrize("name", ["test", "Testing", "gallery", "image_test", "bounding_box_test", "test set"])
def test_queries_are_chosen_from_a_test_folder(make_source: MakeSource, split_crops: Path, name: str) -> None:
    shutil.rmtree(split_crops / "query")
    (split_crops / "bounding_box_test").rename(split_crops / name)
    options = {"name": "own", "parser": "pattern", "root": split_crops, "pattern": SPLIT_PATTERN}
    assert list_source(make_source(**options)).warnings == [
        "no query images: set query_cameras (cameras found: a, b) to evaluate"
    ]
    listing = list_source(make_source(**options, query_cameras=["a"]))
    assert sorted(crop.path for crop in listing.crops if crop.split == "query") == [
        f"{name}/{person}_a_0.png" for person in "23"
    ]


def test_labels_that_say_less_than_the_recipe_thinks_are_told(make_source: MakeSource, split_crops: Path) -> None:
    options = {"name": "own", "parser": "pattern", "root": split_crops, "pattern": SPLIT_PATTERN}
    with pytest.raises(ConfigError, match="query_cameras and labels that say query; set one of them"):
        list_source(make_source(**options, query_cameras=["a"]))
    (split_crops / "query" / "1_a_0.png").touch()
    warnings = list_source(make_source(**options, train_share=0.5)).warnings
    assert warnings[0] == "train_share is not used: the labels say who trains"
    assert warnings[1].startswith("identities that are both in train and in query or gallery: 1 (1).")


def test_unknown_split_is_named_with_its_file(make_source: MakeSource, split_crops: Path) -> None:
    (split_crops / "query").rename(split_crops / "querry")
    source = make_source(name="own", parser="pattern", root=split_crops, pattern=SPLIT_PATTERN)
    with pytest.raises(DataError, match=r"querry/2_a_0\.png: split 'querry' is unknown\. Did you mean query\?"):
        list_source(source)


def test_modality_of_the_path_is_kept(make_source: MakeSource, tmp_path: Path) -> None:
    for modality in ("RGB", "thermal"):
        (tmp_path / "own" / modality).mkdir(parents=True)
        (tmp_path / "own" / modality / "1.png").touch()
    source = make_source(name="own", parser="pattern", root=tmp_path / "own", pattern="{modality}/{person}.png")
    assert [crop.modality for crop in list_source(source).crops] == ["visible", "infrared"]


def test_ignored_fields_may_stand_twice(make_source: MakeSource, crops: Path) -> None:
    source = make_source(name="own", parser="pattern", root=crops, pattern="{_}{person}/{camera}{_}{_day}.png")
    assert len(list_source(source).crops) == 36


def test_keys_of_another_parser_are_refused(make_source: MakeSource, world: Path) -> None:
    with pytest.raises(ConfigError, match=r"`pattern` belongs to the parsers pattern; this source's parser is market"):
        list_source(make_source(pattern=PATTERN))
    with pytest.raises(ConfigError, match=r"`labels` belongs to the parsers list, cuhkpedes"):
        list_source(make_source(labels=Path("a.csv")))

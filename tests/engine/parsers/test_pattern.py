"""Tests of chatreid_plugin.engine.parsers.pattern: any folder of crops, split by identity."""

from collections.abc import Callable
from pathlib import Path

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.engine.parsers.pattern import compile_pattern
from chatreid_plugin.engine.parsing import parse_source
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
    with pytest.raises(ConfigError, match="set one of them"):
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
        ("{Person}.png", "must name {person}"),
        ("{person}/{Camera}.png", "lower-case letters"),
        ("{person}/{camera.png", "lower-case letters"),
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

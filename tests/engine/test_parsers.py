"""Tests of chatreid_plugin.engine.parsers: published layouts, a pattern for any folder, and the damage found there."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.demo.world import FILE_NAME, WorldSummary
from chatreid_plugin.engine.parsers import MARKET_COUNTS, compile_pattern, parse_source, read_image_size
from chatreid_plugin.errors import ConfigError, DataError


MakeSource = Callable[..., SourceSettings]
MakeImage = Callable[..., Path]

SPLITS = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
PATTERN = "{person}/{camera}_{index}.png"


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


def test_market_gives_exactly_what_the_generator_wrote(
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


def test_market_records_know_their_size_and_name(make_source: MakeSource, world: Path) -> None:
    for record in parse_source(make_source(name="mine")).records:
        with Image.open(world / record.path) as image:
            assert (record.width, record.height) == image.size
        assert record.image_id == f"mine/{record.path}"
        assert (record.dataset, record.person_id.split(":")[0], record.modality) == ("mine", "mine", "visible")


def test_other_counts_than_published_are_refused_unless_allowed(make_source: MakeSource, world: Path) -> None:
    with pytest.raises(DataError, match=r"bounding_box_train holds 48 images, Market-1501 has 12936.*allow_count_mis"):
        parse_source(make_source(allow_count_mismatch=False))
    warnings = parse_source(make_source()).warnings
    assert len(warnings) == 3
    assert all(str(count) in warning for count, warning in zip(MARKET_COUNTS.values(), warnings, strict=True))


def test_published_counts_pass(make_source: MakeSource, monkeypatch: pytest.MonkeyPatch, world: Path) -> None:
    counts = {folder: len(list((world / folder).iterdir())) for folder in SPLITS}
    monkeypatch.setattr("chatreid_plugin.engine.parsers.MARKET_COUNTS", counts)
    assert parse_source(make_source(allow_count_mismatch=False)).warnings == []


def test_published_counts_are_those_of_the_label_files() -> None:
    # shared notes on protocols: 13,115 images of 750 identities, 2,798 distractors, 3,819 junk.
    assert MARKET_COUNTS == {
        "bounding_box_train": 12936,
        "query": 3368,
        "bounding_box_test": 13115 + 2798 + 3819,
    }


def test_missing_data_set_is_named(make_source: MakeSource, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Data set folder .*nowhere does not exist"):
        parse_source(make_source(root=tmp_path / "nowhere"))


def test_missing_folder_is_named(make_source: MakeSource, world: Path) -> None:
    shutil.rmtree(world / "query")
    with pytest.raises(DataError, match=r"lacks the folder\(s\) query of Market-1501"):
        parse_source(make_source())


@pytest.mark.parametrize("rename", [None, "person{}.jpg"])
def test_folder_without_a_matching_file_is_named(make_source: MakeSource, world: Path, rename: str | None) -> None:
    for number, path in enumerate(sorted((world / "query").iterdir())):
        if rename is None:
            path.unlink()
        else:
            path.rename(path.with_name(rename.format(number)))
    with pytest.raises(DataError, match=r"query holds no file named like 0002_c1s1_000451_03\.jpg"):
        parse_source(make_source())


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
    records = parse_source(make_source(root=root)).records
    assert {record.path: record.camera_id for record in records} == {path: item[2] for path, item in expected.items()}
    assert len({record.camera_id for record in records}) == 3


def test_leftovers_of_other_systems_are_skipped(make_source: MakeSource, world: Path) -> None:
    expected = list_expected(world)
    folder = world / "bounding_box_train"
    name = sorted(folder.iterdir())[0].name
    for leftover in ("Thumbs.db", f"._{name}", ".DS_Store", f"__MACOSX/{name}", f"__MACOSX/._{name}", f".x/{name}"):
        (folder / leftover).parent.mkdir(exist_ok=True)
        (folder / leftover).write_bytes(b"not an image")
    report = parse_source(make_source())
    assert {record.path for record in report.records} == set(expected)
    assert report.skipped["not an image file"] == 3


def test_names_of_another_form_are_counted(make_source: MakeSource, world: Path) -> None:
    folder = world / "bounding_box_train"
    names = sorted(path.name for path in folder.iterdir())
    for number, wrong in enumerate(("x_" + names[0], "0001_c7s1_000001_00.jpg", "001_c1s1_000001_00.jpg", "a.png")):
        (folder / names[number]).rename(folder / wrong)
    report = parse_source(make_source())
    assert report.skipped["name is not of the form 0002_c1s1_000451_03.jpg"] == 4
    assert sum(record.split == "train" for record in report.records) == len(names) - 4


def test_upper_case_ending_is_accepted(make_source: MakeSource, world: Path) -> None:
    count = len(list_expected(world))
    for path in list((world / "query").iterdir()):
        path.rename(path.with_suffix(".JPG"))
    assert len(parse_source(make_source()).records) == count


def test_image_cut_short_is_named(make_source: MakeSource, world: Path) -> None:
    path = sorted((world / "query").iterdir())[0]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{path.name} cannot be decoded: .*truncated"):
        parse_source(make_source())


def test_empty_image_is_named(make_source: MakeSource, world: Path) -> None:
    path = sorted((world / "query").iterdir())[0]
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{path.name} is empty \(0 bytes\)"):
        parse_source(make_source())


def test_file_that_is_no_image_and_a_broken_link_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(DataError, match=rf"{name} cannot be decoded"):
            read_image_size(tmp_path / name)


def test_image_larger_than_pillow_accepts_is_named(
    tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"a\.jpg cannot be decoded.*decompression bomb"):
        read_image_size(make_image(tmp_path / "a.jpg"))


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

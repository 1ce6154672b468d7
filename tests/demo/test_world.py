"""Tests of the data set that the synthetic world is written as."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chatreid_plugin.demo.people import VOCABULARY, sample_people
from chatreid_plugin.demo.world import CAPTIONS_FILE, FILE_NAME, WorldSummary, write_world
from chatreid_plugin.errors import ConfigError, DataError


TRAIN, GALLERY, QUERY = "bounding_box_train", "bounding_box_test", "query"
ARGUMENTS: dict[str, Any] = {
    "train_people": 4,
    "test_people": 3,
    "cameras": 3,
    "images_per_camera": 2,
    "distractors": 8,
    "junk": 5,
    "seed": 11,
}


def read_world(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def list_names(root: Path, folder: str) -> list[str]:
    return sorted(path.name for path in (root / folder).iterdir())


def list_identities(root: Path, folder: str) -> set[str]:
    return {name.split("_")[0] for name in list_names(root, folder)}


def read_captions(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / CAPTIONS_FILE).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> WorldSummary:
    return write_world(tmp_path_factory.mktemp("world") / "deep" / "market", **ARGUMENTS)


@pytest.fixture(scope="module")
def root(summary: WorldSummary) -> Path:
    return summary.root


def test_summary_counts_the_files(summary: WorldSummary) -> None:
    assert summary == WorldSummary(
        root=summary.root,
        train_images=4 * 3 * 2,
        gallery_images=3 * 3 + 8 + 5,
        query_images=3 * 3,
        distractors=8,
        junk=5,
        captioned_images=4 * 3 * 2 + 3 * 3 * 2,
    )
    assert len(list_names(summary.root, TRAIN)) == summary.train_images
    assert len(list_names(summary.root, GALLERY)) == summary.gallery_images
    assert len(list_names(summary.root, QUERY)) == summary.query_images


def test_root_holds_the_layout_and_nothing_else(root: Path) -> None:
    assert sorted(path.name for path in root.iterdir()) == [GALLERY, TRAIN, CAPTIONS_FILE, QUERY]
    assert [path.name for path in root.parent.iterdir()] == [root.name]


def test_names_match_the_grammar(root: Path) -> None:
    for folder in (TRAIN, GALLERY, QUERY):
        for name in list_names(root, folder):
            match = FILE_NAME.match(name)
            assert match is not None
            assert 1 <= int(match["cam"]) <= 3
    assert "0001_c1s1_000001_00.jpg" in list_names(root, TRAIN)


def test_identities_are_disjoint(root: Path) -> None:
    assert list_identities(root, TRAIN) == {"0001", "0002", "0003", "0004"}
    assert list_identities(root, QUERY) == {"0005", "0006", "0007"}
    assert list_identities(root, GALLERY) == {"0005", "0006", "0007", "0000", "-1"}


def test_each_query_identity_has_one_query_and_a_match_per_camera(root: Path) -> None:
    for folder in (QUERY, GALLERY):
        shots = [name.split("s")[0] for name in list_names(root, folder) if name[:4] not in ("0000", "-1_c")]
        assert sorted(shots) == [f"{person:04d}_c{camera}" for person in (5, 6, 7) for camera in (1, 2, 3)]
    assert not set(list_names(root, QUERY)) & set(list_names(root, GALLERY))


def test_distractors_and_junk_are_in_the_gallery_only(root: Path) -> None:
    names = list_names(root, GALLERY)
    assert sum(name.startswith("0000_") for name in names) == 8
    assert sum(name.startswith("-1_") for name in names) == 5
    assert {name.split("_c")[1][0] for name in names if name.startswith("0000_")} == {"1", "2", "3"}


def test_images_are_jpeg_of_about_native_size(root: Path) -> None:
    native = {"1": 64, "2": 96, "3": 128}
    for path in root.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert abs(image.width / native[path.name.split("_c")[1][0]] - 1) < 0.09


def test_images_differ(root: Path) -> None:
    images = [content for name, content in read_world(root).items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images)


def test_captions_cover_the_images_of_real_people_in_order(root: Path) -> None:
    paths = [line["path"] for line in read_captions(root)]
    files = [name for name in read_world(root) if name.endswith(".jpg")]
    assert paths == sorted(name for name in files if name.split("/")[1][:4] not in ("0000", "-1_c"))


def test_captions_describe_the_person(root: Path) -> None:
    people = {f"{person.person_number:04d}": person for person in sample_people(7, seed=11)}
    for line in read_captions(root):
        assert set(line) == {"path", "captions", "attributes"}
        first, second = line["captions"]
        assert first != second
        attributes = line["attributes"]
        assert attributes == people[line["path"].split("/")[1][:4]].attributes
        assert list(attributes) == list(VOCABULARY)
        for caption in (first, second):
            assert attributes["upper_colour"] in caption
            assert attributes["shoes"] in caption
            assert ("walking" in caption) != ("standing" in caption)
        assert ("walking" in first) == ("walking" in second)


def test_all_wordings_occur(root: Path) -> None:
    captions = [caption for line in read_captions(root) for caption in line["captions"]]
    for pattern in ("This is", "Dressed in", "; ", ", wearing"):
        assert any(pattern in caption for caption in captions)


def test_number_of_workers_does_not_change_a_byte(root: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "market", **ARGUMENTS, workers=2)
    assert read_world(tmp_path / "market") == read_world(root)


def test_growing_the_world_keeps_the_images(root: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = ARGUMENTS | {"train_people": 2, "test_people": 0, "distractors": 0, "junk": 0}
    write_world(tmp_path / "market", **arguments)
    grown = read_world(root)
    images = {name: content for name, content in read_world(tmp_path / "market").items() if name.endswith(".jpg")}
    assert len(images) == 2 * 3 * 2
    assert all(grown[name] == content for name, content in images.items())


def test_other_seed_gives_other_images(root: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "market", train_people=1, test_people=0, cameras=1, seed=12)
    name = f"{TRAIN}/0001_c1s1_000001_00.jpg"
    assert (tmp_path / "market" / name).read_bytes() != (root / name).read_bytes()


def test_few_queries_move_over_the_cameras(tmp_path: Path) -> None:
    summary = write_world(tmp_path / "market", train_people=0, test_people=3, cameras=3, queries_per_person=1)
    assert (summary.query_images, summary.gallery_images) == (3, 15)
    assert {name.split("s")[0].split("_c")[1] for name in list_names(summary.root, QUERY)} == {"1", "2", "3"}


def test_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(DataError, match="is not empty"):
        write_world(tmp_path, train_people=1, test_people=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_foreign_files_are_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(DataError, match=r"mine\.txt"):
        write_world(tmp_path, train_people=1, test_people=0, overwrite=True)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "keep"


def test_file_at_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "market").write_text("keep", encoding="utf-8")
    with pytest.raises(DataError, match="is a file"):
        write_world(tmp_path / "market", train_people=1, test_people=0, overwrite=True)


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "market").mkdir()
    assert write_world(tmp_path / "market", train_people=1, test_people=0, cameras=1).train_images == 2


def test_overwrite_replaces_an_earlier_world(tmp_path: Path) -> None:
    write_world(tmp_path / "market", train_people=2, test_people=0, cameras=1)
    write_world(tmp_path / "market", train_people=1, test_people=0, cameras=1, overwrite=True)
    assert list_identities(tmp_path / "market", TRAIN) == {"0001"}


def test_failure_leaves_the_earlier_world_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path / "market", train_people=1, test_people=0, cameras=1)
    before = read_world(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("chatreid_plugin.demo.world.render_person", fail)
    with pytest.raises(DataError, match="disk full"):
        write_world(tmp_path / "market", train_people=2, test_people=0, cameras=1, overwrite=True)
    assert read_world(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["market"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_people", -1),
        ("test_people", 9999),
        ("cameras", 7),
        ("cameras", 0),
        ("images_per_camera", 0),
        ("queries_per_person", 5),
        ("distractors", -1),
        ("junk", -1),
        ("seed", -1),
        ("workers", 0),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, name: str, value: int) -> None:
    arguments: dict[str, Any] = {"train_people": 1, "test_people": 1, name: value}
    with pytest.raises(ConfigError, match=name if name != "test_people" else "people must be 0 to 9999"):
        write_world(tmp_path / "market", **arguments)
    assert not (tmp_path / "market").exists()


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_world(tmp_path / "market", train_people=1, test_people=0, cameras=1)
    captured = capsys.readouterr()
    assert "synthetic world" in captured.err
    assert captured.out == ""

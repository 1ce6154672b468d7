"""Tests of chatreid_plugin.engine.manifests: captions by path and by person, and wrong lines named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.engine.manifests import attach_annotations, parse_source
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import ImageRecord


RECORDS = [
    ImageRecord(f"own/{person}/{name}.jpg", "own", "train", f"{person}/{name}.jpg", f"own:{person}", name, 64, 128)
    for person in ("0001", "0002")
    for name in ("a", "b")
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "captions.jsonl"


def write_lines(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_captions_of_a_path_go_to_that_image(path: Path) -> None:
    write_lines(path, {"path": "0001/b.jpg", "captions": ["tall", "thin"], "attributes": {"hat": "cap"}})
    records, _ = attach_annotations(RECORDS, path)
    assert [record.captions for record in records] == [(), ("tall", "thin"), (), ()]
    assert [record.attributes for record in records] == [{}, {"hat": "cap"}, {}, {}]
    assert [record.path for record in records] == [record.path for record in RECORDS]


def test_captions_of_a_person_go_to_all_their_images(path: Path) -> None:
    write_lines(path, {"person": "0002", "captions": ["tall"], "attributes": {"hat": "cap"}})
    records, _ = attach_annotations(RECORDS, path)
    assert [record.captions for record in records] == [(), (), ("tall",), ("tall",)]
    assert records[3].attributes == {"hat": "cap"}


@pytest.mark.parametrize("number", [7, 7.0])
def test_a_number_stands_for_its_digits(path: Path, number: float) -> None:
    write_lines(path, {"person": number, "captions": ["tall"]})
    records, _ = attach_annotations([replace(RECORDS[0], person_id="own:7")], path)
    assert records[0].captions == ("tall",)


@pytest.mark.parametrize("path_first", [True, False])
def test_what_an_image_says_replaces_what_its_person_says(path: Path, path_first: bool) -> None:
    lines: list[dict[str, Any]] = [
        {"path": "0001/a.jpg", "captions": ["seen from behind"]},
        {"person": "0001", "captions": ["tall"], "attributes": {"hat": "cap"}},
    ]
    write_lines(path, *(lines if path_first else lines[::-1]))
    first, second, *_ = attach_annotations(RECORDS, path)[0]
    assert (first.captions, first.attributes) == (("seen from behind",), {"hat": "cap"})
    assert (second.captions, second.attributes) == (("tall",), {"hat": "cap"})


def test_labels_of_the_data_set_stay_where_the_file_says_nothing(path: Path) -> None:
    labelled = [replace(RECORDS[0], captions=("as published",), attributes={"hat": "none"})]
    write_lines(path, {"path": "0001/a.jpg", "attributes": {"hat": "cap"}, "model": "gpt-4o"})
    records, dropped = attach_annotations(labelled, path)
    assert (records[0].captions, records[0].attributes, dropped) == (("as published",), {"hat": "cap"}, 0)


def test_training_images_with_unrecognised_clothing_have_no_words_and_are_counted(path: Path) -> None:
    tested = replace(RECORDS[1], split="gallery")
    hidden = {"captions": [], "attributes": {}, "clothing_recognised": False, "model": "gpt-4o"}
    seen = {"path": "0002/a.jpg", "captions": ["tall"], "clothing_recognised": True}
    # Not their person's either: Stage 1 leaves them out (paper section 3.2), Stages 2 and 3 ask who it is.
    person = {"person": "0001", "captions": ["a man"], "attributes": {"hat": "cap"}}
    write_lines(path, {"path": "0001/a.jpg", **hidden}, {"path": "0001/b.jpg", **hidden}, seen, person)
    records, occluded = attach_annotations([RECORDS[0], tested, *RECORDS[2:]], path)
    assert [record.path for record in records] == ["0001/a.jpg", "0001/b.jpg", "0002/a.jpg", "0002/b.jpg"]
    assert (records[0].captions, records[0].attributes, records[2].captions) == ((), {}, ("tall",))
    assert occluded == 1


def test_parsing_says_what_is_occluded(make_source: Any, world: Path) -> None:
    before = parse_source(make_source()).records
    name = next(record.path for record in before if record.split == "train")
    write_lines(world / "own.jsonl", {"path": name, "clothing_recognised": False})
    report = parse_source(make_source(captions=world / "own.jsonl"))
    assert {record.path for record in before} == {record.path for record in report.records}
    assert "1 training images are occluded (clothing not recognised); Stage 1 leaves them out" in report.warnings


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"path": "0001/c.jpg", "captions": ["x"]}, r"no path '0001/c\.jpg'"),
        ({"person": "1", "captions": ["x"]}, r"no person '1'\. Did you mean '0001'\?"),
        ({"person": 1, "captions": ["x"]}, r"no person 1\. Did you mean '0001'\?"),
        ({"person": ["0001"], "captions": ["x"]}, r"no person \['0001'\]"),
        ({"person": None, "captions": ["x"]}, "no person None"),
        ({"captions": ["x"]}, "needs either `path` or `person`"),
        ({"path": "0001/a.jpg", "person": "0001", "captions": ["x"]}, "needs either `path` or `person`"),
        ({"path": "0001/a.jpg", "caption": ["x"]}, r"unknown key 'caption'\. Did you mean captions\?"),
        ({"path": "0001/a.jpg", "Captions": ["x"]}, r"unknown key 'Captions'\. Did you mean captions\?"),
        ({"path": "0001/a.jpg", "zzz": 1}, r"unknown key 'zzz'\. Keys are path, person, captions"),
        ({"path": "0001/a.jpg", "captions": "x"}, "captions must be a list of texts"),
        ({"path": "0001/a.jpg", "captions": ["x", 3]}, "captions must be a list of texts"),
        ({"path": "0001/a.jpg", "captions": [" "]}, "captions must be a list of texts"),
        ({"path": "0001/a.jpg", "attributes": ["x"]}, "attributes must be an object"),
        ({"path": "0001/a.jpg", "attributes": {"age": 30}}, "attributes must be an object"),
        ({"path": "0001/a.jpg", "clothing_recognised": "no"}, "clothing_recognised must be true or false"),
        ({"path": "0001/b.jpg"}, "was described before"),
    ],
)
def test_wrong_line_is_named_with_the_file(path: Path, line: dict[str, Any], message: str) -> None:
    write_lines(path, {"path": "0001/b.jpg", "captions": ["x"]}, line)
    with pytest.raises(DataError, match=rf"captions\.jsonl, line 2: .*{message}"):
        attach_annotations(RECORDS, path)


def test_missing_file_is_named(path: Path) -> None:
    with pytest.raises(DataError, match=r"captions\.jsonl does not exist"):
        attach_annotations(RECORDS, path)


def test_world_is_described_as_the_generator_wrote(make_source: Any, world: Path) -> None:
    lines = [json.loads(line) for line in (world / "captions.jsonl").read_text().splitlines()]
    expected = {line["path"]: (tuple(line["captions"]), line["attributes"]) for line in lines}
    records = parse_source(make_source(captions=world / "captions.jsonl")).records
    found = {record.path: (record.captions, record.attributes) for record in records if record.captions}
    assert found == expected
    # Nobody describes a distractor.
    assert {record.person_id for record in records if not record.captions} == {"market1501:0000"}

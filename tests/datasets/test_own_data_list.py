"""Tests of chatreid_plugin.datasets.own_data: a user's own CSV or JSON Lines file of images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.listing import Listing
from chatreid_plugin.datasets.registry import list_source
from chatreid_plugin.errors import ConfigError, DataError


ROWS = [
    "path,person,camera,split",
    "a/1.jpg,007,c1,train",
    "b/2.jpg,8,c1,query",
    "b/3.jpg,8,c2,test",
    "b/4.jpg,-1,c2,test",
]
ListRows = Callable[..., Listing]


@pytest.fixture
def list_rows(tmp_path: Path) -> ListRows:
    """Return a function that writes a list beside empty images and lists them."""

    def write(rows: list[str] | bytes, name: str = "own.csv", **changes: Any) -> Listing:
        root = tmp_path / "images"
        for path in ("a/1.jpg", "b/2.jpg", "b/3.jpg", "b/4.jpg"):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
        file = tmp_path / name
        file.write_bytes(rows if isinstance(rows, bytes) else "\n".join(rows).encode())
        return list_source(SourceSettings(name="own", parser="list", root=root, labels=file, **changes))

    return write


def test_csv_says_person_camera_and_split(list_rows: ListRows) -> None:
    listing = list_rows(ROWS)
    assert [(crop.path, crop.person, crop.camera, crop.split) for crop in listing.crops] == [
        ("a/1.jpg", "007", "c1", "train"),
        ("b/2.jpg", "8", "c1", "query"),
        ("b/3.jpg", "8", "c2", "gallery"),
    ]
    assert (listing.skipped, listing.warnings) == ({"junk (identity -1)": 1}, [])


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + "\r\n".join(ROWS),
        "\n".join(ROWS).replace(",", ";"),
        "\n".join(ROWS).replace(",", "\t") + "\n\n",
        "\n".join(ROWS).replace(",8,", ",8.0,").replace("-1", "-1.0"),
        "\n".join(ROWS).replace("path,person", "Path, Person"),
        "\n".join(ROWS).replace("b/2", "b\\\\2").replace("\\\\", "\\"),
    ],
    ids=["BOM", "semicolons", "tabs", "pandas", "capitals", "backslash"],
)
def test_csv_of_other_programs_says_the_same(list_rows: ListRows, content: str) -> None:
    assert list_rows(content.encode()).crops == list_rows(ROWS).crops


def test_json_lines_say_the_same(list_rows: ListRows) -> None:
    header, *rows = [row.split(",") for row in ROWS]
    lines = [json.dumps(dict(zip(header, row, strict=True))) for row in rows]
    lines[1] = lines[1].replace('"8"', "8.0")
    assert list_rows(lines, "own.jsonl").crops == list_rows(ROWS).crops
    lines[1] = json.dumps({"path": "b/2.jpg", "person": 8, "camera": "c1", "split": "query", "caption": ["a", "b"]})
    assert list_rows(lines, "own.jsonl").crops[1].captions == ("a", "b")


def test_optional_columns_are_read(list_rows: ListRows) -> None:
    rows = ["path,person,split,clothes,modality,caption", 'a/1.jpg,1,train,,thermal,"a tall, thin man"']
    rows += ['a/1.jpg,1,train,,ir,"in a coat"', "b/2.jpg,2,train,red,rgb,", "b/3.jpg,3,query,,,x"]
    first, second, third = list_rows(rows).crops
    assert first.captions == ("a tall, thin man", "in a coat")
    assert (first.camera, first.clothes, first.modality) == ("a/1.jpg", None, "infrared")
    assert (second.captions, second.clothes, second.modality) == ((), "red", "visible")
    assert third.modality == "visible"


def test_people_are_shared_out_where_no_split_is_given(list_rows: ListRows) -> None:
    rows = [row.rpartition(",")[0] for row in ROWS]
    listing = list_rows(rows, query_cameras=["c1"])
    assert [crop.split for crop in listing.crops] == ["train", "query", "gallery"]


def test_absolute_paths_below_the_root_are_taken(list_rows: ListRows, tmp_path: Path) -> None:
    rows = [ROWS[0], *(f"{tmp_path}/images/{row}" for row in ROWS[1:])]
    assert list_rows(rows).crops == list_rows(ROWS).crops


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a/1.jpg,7,c1", "line 2: 3 cells, but 4 columns"),
        ("a/1.jpg,7,c1,tset", r"line 2: split 'tset' is unknown\. Did you mean test\?"),
        ("a/1.jpg,,c1,train", "line 2: `person` must be a number or a text that is not empty"),
        ("../secret.jpg,7,c1,train", "line 2: `path` .* does not lie below"),
        ("/etc/passwd.jpg,7,c1,train", "line 2: `path` .* does not lie below"),
        ('"a/1.jpg,7,c1,train', "not valid CSV"),
        ("c/1.jpg,7,c1,train", "1 of 1 images that the labels name are missing"),
        ("a/1.jpg,-1,c1,train", "names no image but junk"),
        ("", "names no image"),
        ("a/1.jpg,7,c1,train\na/1.jpg,8,c1,train", r"line 3: a/1\.jpg has other labels than in .*line 2"),
        ("a/1.jpg,7,c1,train\nb/2.jpg,7,c1,", "some rows have a split and some have none"),
    ],
)
def test_wrong_row_is_named(list_rows: ListRows, row: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list_rows([ROWS[0], row])


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"path,person,cam,split\na/1.jpg,7,c1,train", "own.csv", r"unknown column 'cam'\. Did you mean camera\?"),
        (b"a/1.jpg,7,c1,train", "own.csv", "the first line must name the columns, each once: path,person"),
        (b"path,path\na,b", "own.csv", "each once"),
        (b"", "own.csv", "the first line must name"),
        (b"path,person\n\xff\xfe", "own.csv", "not text in UTF-8"),
        (b"path,person", "own.xlsx", r"save the list as \.csv"),
        (b'{"path": "a/1.jpg", "pid": 1}', "own.jsonl", r"line 1: unknown column 'pid'"),
        (b'{"path": 3, "person": 1}', "own.jsonl", "line 1: `path` must be an image path"),
        (b'{"path": "a/1.jpg", "person": [1]}', "own.jsonl", "line 1: `person` must be a number or a text"),
        (b'{"path": "a/1.jpg", "person": 1, "caption": 5}', "own.jsonl", "line 1: `caption` must be a list of texts"),
    ],
)
def test_wrong_list_is_named(list_rows: ListRows, content: bytes, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list_rows(content, name)


def test_the_list_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Source own needs `labels`"):
        list_source(SourceSettings(name="own", parser="list", root=tmp_path))
    with pytest.raises(DataError, match=r"none\.csv does not exist"):
        list_source(SourceSettings(name="own", parser="list", root=tmp_path, labels=tmp_path / "none.csv"))

"""Tests of chatreid_plugin.shards: nothing half-written, damage is named, the same rows give the same bytes."""

import errno
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatreid_plugin import shards
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import IMAGE_RECORD_SCHEMA, ImageRecord
from chatreid_plugin.shards import (
    check_shard,
    make_manifest_table,
    open_atomically,
    read_json,
    read_json_lines,
    read_manifest,
    read_manifest_provenance,
    read_manifest_table,
    read_shard,
    write_json,
    write_manifest,
    write_shard,
    write_table,
)


SCHEMA = pa.schema([("name", pa.string()), ("numbers", pa.list_(pa.int16()))])
ROWS = [{"name": f"row {number}", "numbers": list(range(number % 5))} for number in range(1000)]


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def make_record(name: str) -> ImageRecord:
    return ImageRecord(
        f"own/{name}", "own", "train", name, "own:1", "c1", 64, 128, None, "visible", ("tall",), {"a": "b"}
    )


def test_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with open_atomically(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert list_files(tmp_path) == ["deep/file.txt"]


def test_failing_block_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), open_atomically(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert list_files(tmp_path) == ["file.txt"]


def test_failing_write_of_a_shard_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(table: pa.Table, where: Path, **options: str) -> None:
        where.write_bytes(b"PAR1")
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.pq, "write_table", write_half)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "set" / "00000.parquet", ROWS, SCHEMA)
    assert list_files(tmp_path) == []


def test_unfinished_shard_lies_beside_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # LLaMA-Factory reads every file of a data set's folder, so a killed run may leave nothing in there.
    seen: list[Path] = []
    monkeypatch.setattr(shards.pq, "write_table", lambda table, where, **options: (seen.append(where), where.touch()))
    write_shard(tmp_path / "set" / "00000.parquet", ROWS, SCHEMA)
    assert [path.parent for path in seen] == [tmp_path]


def test_unfinished_manifest_lies_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # manifest_dir may be a disk of its own, and renaming works within one disk only.
    seen: list[Path] = []
    monkeypatch.setattr(shards.pq, "write_table", lambda table, where, **options: (seen.append(where), where.touch()))
    write_manifest(tmp_path / "manifests" / "own.parquet", [make_record("a.jpg")], tmp_path, {})
    assert [path.parent for path in seen] == [tmp_path / "manifests"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EACCES])
def test_disk_that_takes_no_more_is_one_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def write_half(table: pa.Table, where: Path, **options: str) -> None:
        where.write_bytes(b"PAR1")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shards.pq, "write_table", write_half)
    with pytest.raises(DataError, match=r"x\.parquet cannot be written: .*\. Make room or check"):
        write_table(tmp_path / "x.parquet", pa.table({"a": [1]}))
    assert list_files(tmp_path) == []


def test_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one/00000.parquet", "two/00007.parquet"):
        write_shard(tmp_path / name, ROWS, SCHEMA)
    write_shard(tmp_path / "three/00000.parquet", ROWS[::-1], SCHEMA)
    one, two, three = (next((tmp_path / name).iterdir()).read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_shard_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "name=other" / "00000.parquet"
    write_shard(path, ROWS, SCHEMA)
    table = read_shard(path, SCHEMA)
    assert table.to_pylist() == ROWS
    assert table.schema.equals(SCHEMA)
    assert check_shard(path) == len(ROWS)
    assert pq.read_metadata(path).row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_shard_cut_short_is_one_error_that_names_it(tmp_path: Path, share: float) -> None:
    path = tmp_path / "set" / "00003.parquet"
    write_shard(path, ROWS, SCHEMA)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"00003\.parquet is not a readable Parquet file .*Build it again"):
        read_shard(path, SCHEMA)
    with pytest.raises(DataError, match=r"00003\.parquet is not a readable Parquet file .*Build it again"):
        check_shard(path)


def test_damaged_pages_are_an_error_that_names_the_shard(tmp_path: Path) -> None:
    path = tmp_path / "set" / "00003.parquet"
    write_shard(path, ROWS, SCHEMA)
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"00003\.parquet"):
        read_shard(path, SCHEMA)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.parquet does not exist"):
        read_shard(tmp_path / "none.parquet", SCHEMA)


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "set" / "other.parquet"
    write_shard(path, [{"name": "a", "extra": 1}], pa.schema([("name", pa.string()), ("extra", pa.int8())]))
    with pytest.raises(DataError, match=r"other\.parquet lacks column\(s\) numbers; found name, extra"):
        read_shard(path, SCHEMA)


def test_column_that_earlier_versions_did_not_write_is_null(tmp_path: Path) -> None:
    write_shard(tmp_path / "old.parquet", [{"name": "a"}], pa.schema([SCHEMA.field("name")]))
    table = read_shard(tmp_path / "old.parquet", SCHEMA, ["numbers"])
    assert table.schema == SCHEMA
    assert table.to_pylist() == [{"name": "a", "numbers": None}]
    write_shard(tmp_path / "new.parquet", ROWS[:3], SCHEMA)
    assert read_shard(tmp_path / "new.parquet", SCHEMA, ["numbers"]).to_pylist() == ROWS[:3]


def test_wrong_type_of_a_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set" / "other.parquet"
    write_shard(path, [{"name": "a", "numbers": "1"}], pa.schema([("name", pa.string()), ("numbers", pa.string())]))
    with pytest.raises(DataError, match=r"other\.parquet has a column of another type"):
        read_shard(path, SCHEMA)


def test_value_that_does_not_fit_its_column_is_an_error_that_names_the_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.parquet cannot be written"):
        write_shard(tmp_path / "x.parquet", [{"name": "a", "numbers": [70000]}], SCHEMA)


def test_json_is_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Zoë", "list": [1, None]})
    assert read_json(tmp_path / "a.json") == {"name": "Zoë", "list": [1, None]}
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "Zoë" in text and text.endswith("}\n")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_broken_json_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json is not (valid JSON|text in UTF-8)"):
        read_json(tmp_path / "a.json")


def test_missing_json_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path)


def test_json_lines_carry_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"b": "\xc3\xab"}')
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (4, {"b": "ë"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [(b"{", "not valid JSON"), (b"[1]", "expected a JSON object, found list"), (b'{"a": "\xff"}', "not valid JSON")],
)
def test_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: {message}"):
        list(read_json_lines(path))


def test_missing_json_lines_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl does not exist"):
        next(read_json_lines(tmp_path / "a.jsonl"))


def test_manifest_is_read_back_with_its_root(tmp_path: Path) -> None:
    path = tmp_path / "manifests" / "own.parquet"
    records = [make_record("a.jpg"), make_record("b.jpg")]
    assert write_manifest(path, records, tmp_path / "raw" / "own", {"version": "1"}) == 2
    assert read_manifest(path) == (records, tmp_path / "raw" / "own")
    provenance = json.loads((tmp_path / "manifests" / "own.parquet.json").read_text())
    assert len(provenance.pop("manifest_digest")) == 32
    assert provenance == {"image_root": "../raw/own", "version": "1"}
    assert list_files(tmp_path) == ["manifests/own.parquet", "manifests/own.parquet.json"]


def test_manifest_is_the_table_of_its_records(tmp_path: Path) -> None:
    records = [make_record("a.jpg"), make_record("b.jpg")]
    write_manifest(tmp_path / "own.parquet", records, tmp_path / "raw", {})
    table, root = read_manifest_table(tmp_path / "own.parquet")
    assert root == tmp_path / "raw"
    assert table.equals(make_manifest_table(records))
    assert table.schema.equals(IMAGE_RECORD_SCHEMA)
    assert make_manifest_table([]).schema.equals(IMAGE_RECORD_SCHEMA)


def test_manifest_works_after_its_folder_has_moved(tmp_path: Path) -> None:
    write_manifest(
        tmp_path / "old" / "manifests" / "own.parquet", [make_record("a.jpg")], tmp_path / "old" / "raw", {}
    )
    (tmp_path / "old").rename(tmp_path / "new")
    assert read_manifest(tmp_path / "new" / "manifests" / "own.parquet")[1] == tmp_path / "new" / "raw"


def test_manifest_finds_its_root_from_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest(Path("manifests/own.parquet"), [], Path("raw"), {})
    assert read_manifest(Path("manifests/own.parquet")) == ([], tmp_path / "raw")


def test_missing_manifest_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"own\.parquet does not exist. `chatreid parse CONFIG.yaml` makes it"):
        read_manifest(tmp_path / "own.parquet")


@pytest.mark.parametrize("provenance", ["[]", "{}", '{"image_root": 1}'])
def test_manifest_with_a_strange_provenance_is_refused(tmp_path: Path, provenance: str) -> None:
    path = tmp_path / "own.parquet"
    write_manifest(path, [], tmp_path, {})
    (tmp_path / "own.parquet.json").write_text(provenance)
    with pytest.raises(DataError, match=r"own\.parquet\.json does not name an image_root"):
        read_manifest(path)
    (tmp_path / "own.parquet.json").unlink()
    with pytest.raises(DataError, match=r"own\.parquet\.json does not exist"):
        read_manifest_provenance(path)


def test_provenance_of_another_manifest_is_refused(tmp_path: Path) -> None:
    """As a run leaves it that is killed between the two files: its own images, with the settings of the one before."""
    path = tmp_path / "own.parquet"
    write_manifest(path, [make_record("a.jpg")], tmp_path, {"version": "1"})
    before = (tmp_path / "own.parquet.json").read_text()
    write_manifest(path, [make_record("b.jpg")], tmp_path, read_manifest_provenance(path))
    assert read_manifest(path)[0] == [make_record("b.jpg")]
    (tmp_path / "own.parquet.json").write_text(before)
    with pytest.raises(DataError, match=r"own\.parquet\.json belongs to another own\.parquet.*`chatreid parse`"):
        read_manifest(path)


def test_parquet_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "own.parquet", ROWS, SCHEMA)
    with pytest.raises(DataError, match="lacks column"):
        read_manifest(tmp_path / "own.parquet")
    assert "numbers" not in IMAGE_RECORD_SCHEMA.names


def test_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [line for _, line in read_json_lines(tmp_path / "a.json")] == [{"a": 1}]


@pytest.mark.parametrize("text", [r'{"a": "\ud800"}', r'{"\udc00": 1}'])
def test_half_a_character_is_refused_where_it_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json is not valid JSON \(half a character"):
        read_json(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"a\.json, line 1: not valid JSON \(half a character"):
        list(read_json_lines(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text(r'"\ud83d\ude00"')
    assert read_json(tmp_path / "a.json") == "\U0001f600"


def test_half_a_character_is_refused_where_it_is_written(tmp_path: Path) -> None:
    record = ImageRecord("own/1", "own", "train", "1.png", "own:1", "c", 4, 8, captions=("\ud800",))
    with pytest.raises(DataError, match="cannot be written: a value does not fit"):
        write_manifest(tmp_path / "a.parquet", [record], tmp_path, {})


def test_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    for write in (lambda path: write_json(path, {}), lambda path: write_shard(path, [], SCHEMA)):
        with pytest.raises(DataError, match="out/a/b cannot be written"):
            write(tmp_path / "out" / "a" / "b")


@pytest.mark.parametrize("path", ["../a.png", "a/../../b.png", "/etc/a.png", "a\\..\\b.png"])
def test_manifest_that_names_files_outside_its_folder_is_refused(tmp_path: Path, path: str) -> None:
    write_manifest(tmp_path / "a.parquet", [make_record("1.png"), make_record(path)], tmp_path, {})
    with pytest.raises(DataError, match=r"a\.parquet names the image .*, which does not lie below its folder"):
        read_manifest(tmp_path / "a.parquet")


def test_manifest_with_an_image_of_nobody_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a.parquet", [make_record("1.png")], tmp_path, {})
    table = make_manifest_table([make_record("1.png")])
    column = table.schema.get_field_index("person_id")
    write_table(tmp_path / "a.parquet", table.set_column(column, "person_id", pa.nulls(1, pa.string())))
    with pytest.raises(DataError, match=r"a\.parquet: an image has no person_id"):
        read_manifest(tmp_path / "a.parquet")

"""Read and write Parquet shards and JSON files so that nothing is ever half-written.

A file is written under a temporary name and renamed; provenance stands beside a data folder, never inside it, because
LLaMA-Factory refuses a data set folder with files of two types.
"""

import codecs
import json
import os
import platform
import re
import shutil
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import xxhash

from .errors import DataError
from .records import IMAGE_RECORD_SCHEMA, ImageRecord, convert_image_record_to_row, convert_row_to_image_record
from .regular_files import check_regular, leaves_root, open_regular, read_regular


# pyarrow makes its compute functions when this is imported, so that no type checker knows them.
pc: Any = pyarrow.compute
# The escapes of UTF-16's surrogates, which belong together in pairs.
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


# Beside the data sets of `chatreid build`: LLaMA-Factory's table of them, and why there are no records of others.
DATASET_INFO = "dataset_info.json"
LEFT_OUT = "chatreid_left_out.json"
# What that table calls the format of our records.
FORMATTING = "chatreid"
# Ends the names of data sets whose identities do not train.
HELD_OUT = "_val"
# In the provenance of a manifest: a hash of the manifest's bytes, so that the two are known to belong together.
DIGEST = "manifest_digest"


@contextmanager
def open_atomically(path: Path, temporary_folder: Path | None = None) -> Generator[Path, None, None]:
    """Yield a temporary path; rename it to ``path`` if the block succeeds, else remove it.

    Args:
        path: the file to write; its folder is made.
        temporary_folder: where the temporary file lies, on the same file system; the file's own folder if None.

    Raises:
        DataError: the disk is full or cannot be written; nothing is left of the file.
    """
    temporary = (temporary_folder or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        advice = "Name a folder" if os.path.isfile(path.parent) else "Make room or check the permissions"
        raise DataError(f"{path} cannot be written: {error}. {advice}, then run again.") from None
    finally:
        with suppress(OSError):  # missing, or its folder is a file
            temporary.unlink()


@contextmanager
def open_folder_atomically(
    path: Path, *, keep_others: bool = False, failures: tuple[type[Exception], ...] = ()
) -> Generator[Path, None, None]:
    """Yield an empty temporary folder, which takes the place of ``path`` if the block succeeds, else is removed.

    Args:
        path: the folder to write; those above it are made.
        keep_others: move the files into a folder that is there already, instead of replacing it whole. The temporary
            folder then lies in it (beside it otherwise), since its parent may be another's, as that of a home is.
        failures: what a library raises instead of OSError when the disk is full.

    Raises:
        DataError: the disk is full or cannot be written; ``path`` is as it was.
    """
    target = path.resolve()
    # The host's name: on a shared file system, two nodes may have the same process id.
    parent = target if keep_others and target.is_dir() else target.parent
    temporary = parent / f".{target.name}.{platform.node()}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed run; containers give the same ids again
        temporary.mkdir(parents=True)
        yield temporary
        if parent == target:
            _move_files(temporary, target)
        else:
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
    except (OSError, *failures) as error:
        raise DataError(
            f"{path} cannot be written: {error}. Make room or check the permissions, then run again."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_files(source: Path, target: Path) -> None:
    files = sorted(file for file in source.rglob("*") if file.is_file())
    for folder in sorted({target / file.relative_to(source).parent for file in files}):
        folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        os.replace(file, target / file.relative_to(source))


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, atomically.

    Raises:
        DataError: as ``open_atomically``; or the text has half a character, as names of files that are no UTF-8 have.
    """
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        shown = text[max(0, error.start - 40) : error.end + 20]
        raise DataError(
            f"{path} cannot be written: {shown!r} has half a character (a name that is no UTF-8?)."
        ) from None
    with open_atomically(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, with or without the byte order mark that editors on Windows put first.

    Raises:
        DataError: the file is missing, is no regular file, or is not UTF-8.
    """
    try:
        return read_regular(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}). Save it as UTF-8.") from None


def _parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text, whatever a stranger wrote.

    Raises:
        DataError: it is not JSON, a number is too long, it is nested too deep, or a text has half a character, which
            no file could keep.
    """
    try:
        value = json.loads(text)
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise DataError(f"{where} not valid JSON (half a character, such as \\ud800 alone).") from None
    except RecursionError:
        raise DataError(f"{where} not valid JSON (nested too deep).") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise DataError(f"{where} not valid JSON ({error}).") from None


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} not valid JSON ({error}).") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    return _parse_json(read_text(path), f"{path} is")


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSON Lines file, blank lines skipped.

    Raises:
        DataError: the file is missing, or a line is not a JSON object.
    """
    try:
        lines = open_regular(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    with lines:
        for number, line in enumerate(lines, 1):
            # Editors on Windows put a byte order mark first.
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not content.strip():
                continue
            value = _parse_json(_decode(content, f"{path}, line {number}:"), f"{path}, line {number}:")
            if not isinstance(value, dict):
                raise DataError(f"{path}, line {number}: expected a JSON object, found {type(value).__name__}.")
            yield number, value


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows as one zstd-compressed Parquet file, atomically; the bytes depend on the rows alone.

    The temporary file lies beside the folder: LLaMA-Factory reads every file of a data set folder, and a killed run
    may leave one behind.
    """
    write_table(path, _make_table(path, rows, schema), path.parent.parent)


def _make_table(name: Path | str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    try:
        return pa.Table.from_pylist(list(rows), schema=schema)
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise DataError(f"{name} cannot be written: a value does not fit its column ({error}).") from None


def write_table(path: Path, table: pa.Table, temporary_folder: Path | None = None) -> None:
    """Write a table as one zstd-compressed Parquet file, atomically; the bytes depend on the table alone.

    Raises:
        DataError: the disk is full or cannot be written; nothing is left of the file.
    """
    with open_atomically(path, temporary_folder) as temporary:
        pq.write_table(table, temporary, compression="zstd")


@contextmanager
def open_parquet(path: Path, advice: str = "Build it again.") -> Generator[pq.ParquetFile, None, None]:
    """Open a Parquet file for reading.

    Args:
        path: the file.
        advice: what to do about one that cannot be read.

    Raises:
        DataError: it is missing or damaged, or promises more than it can hold: a file of some kB may say that it has
            a thousand million rows of nulls. Records have an id of their own, so that a row takes bytes.
    """
    try:
        check_regular(path)
        # Not read_table: that takes a folder named `a=b` for a column.
        with pq.ParquetFile(path) as file:
            rows, size = file.metadata.num_rows, path.stat().st_size
            if rows > size:
                raise DataError(f"{path} promises {rows:,} rows in {size:,} bytes, as no shard has. {advice}")
            yield file
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file (cut short?): {error}. {advice}") from None


def read_shard(path: Path, schema: pa.Schema, optional: Collection[str] = ()) -> pa.Table:
    """Read one shard and check its columns.

    Args:
        path: the file.
        schema: the columns.
        optional: those that a file of an earlier version may lack; they are null then.

    Raises:
        DataError: the file is missing, is cut short, or has other columns or columns of another type.
    """
    with open_parquet(path) as file:
        table = file.read()
    for name in optional:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, schema.field(name).type))
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise DataError(f"{path} lacks column(s) {', '.join(missing)}; found {', '.join(table.column_names)}.")
    try:
        return table.select(schema.names).cast(schema)
    except pa.ArrowException as error:
        raise DataError(f"{path} has a column of another type: {error}.") from None


def check_shard(path: Path) -> int:
    """Return the number of rows of a shard, from its footer alone.

    Raises:
        DataError: the file is cut short or is no Parquet file.
    """
    with open_parquet(path) as file:
        return file.metadata.num_rows


def write_manifest(path: Path, records: Iterable[ImageRecord], image_root: Path, provenance: Mapping[str, Any]) -> int:
    """Write ImageRecords as ``path`` and their provenance as ``<path>.json``; return the number of records.

    The provenance names the folder that the records' paths are relative to, itself relative to the manifest.
    """
    table = make_manifest_table(records)
    root = os.path.relpath(image_root.resolve(), path.parent.resolve())
    write_table(path, table)
    values = {"image_root": Path(root).as_posix(), **provenance, DIGEST: digest_file(path)}
    write_json(path.with_name(path.name + ".json"), values)
    return table.num_rows


def make_manifest_table(records: Iterable[ImageRecord]) -> pa.Table:
    """Return ImageRecords as a table of ``IMAGE_RECORD_SCHEMA``."""
    rows = [convert_image_record_to_row(record) for record in records]
    return _make_table("The manifest", rows, IMAGE_RECORD_SCHEMA)


def keep_rows(table: pa.Table, chosen: pa.Array) -> pa.Table:
    """Return some rows of a table, ``chosen`` being true for each.

    Filtering a hundred thousand rows of nested columns takes half a second; often there is nothing to leave out.
    """
    if pc.all(chosen).as_py():
        return table
    return table.filter(chosen) if pc.any(chosen).as_py() else table.slice(0, 0)


def select_splits(table: pa.Table, *splits: str) -> pa.Table:
    """Return the images of some splits of a manifest's table."""
    return keep_rows(table, pc.is_in(table["split"], pa.array(splits)))


def read_manifest_provenance(path: Path) -> dict[str, Any]:
    """Return the provenance of a manifest.

    Raises:
        DataError: it is missing, unreadable, of another manifest, or does not name the image root.
    """
    provenance_path = path.with_name(path.name + ".json")
    provenance = read_json(provenance_path)
    if not isinstance(provenance, dict) or not isinstance(provenance.get("image_root"), str):
        raise DataError(f"{provenance_path} does not name an image_root. Make it again with `chatreid parse`.")
    if provenance.get(DIGEST) not in (None, digest_file(path)):
        raise DataError(
            f"{provenance_path} belongs to another {path.name}: a run was killed between the two, or one of them was "
            "replaced. Make both again with `chatreid parse`."
        )
    return provenance


def digest_file(path: Path) -> str:
    """Return a hash over the bytes of a file.

    Raises:
        DataError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    return digest.hexdigest()


def _check_images(path: Path, table: pa.Table) -> None:
    """Refuse a manifest that lacks what every image has, or names files outside its folder."""
    advice = "Make it again with `chatreid parse`."
    for name in ("image_id", "dataset", "split", "path", "person_id", "camera_id", "width", "height"):
        if table[name].null_count:
            raise DataError(f"{path}: an image has no {name}. {advice}")
    for image in table["path"].to_pylist():
        if leaves_root(image):
            raise DataError(f"{path} names the image {image!r}, which does not lie below its folder. {advice}")


def read_manifest_table(path: Path) -> tuple[pa.Table, Path]:
    """Return a manifest as a table of ``IMAGE_RECORD_SCHEMA``, and the folder that its paths are relative to.

    Raises:
        DataError: the manifest or its provenance is missing or unreadable, or names files outside the folder.
    """
    if not path.is_file():
        raise DataError(
            f"Manifest {path} does not exist. `chatreid parse CONFIG.yaml` makes it, under the name of the source."
        )
    table = read_shard(path, IMAGE_RECORD_SCHEMA)
    _check_images(path, table)
    provenance = read_manifest_provenance(path)
    return table, (path.parent / provenance["image_root"]).resolve()


def read_manifest(path: Path) -> tuple[list[ImageRecord], Path]:
    """Return the ImageRecords of a manifest and the folder that their paths are relative to.

    Raises:
        DataError: the manifest or its provenance is missing or unreadable.
    """
    table, root = read_manifest_table(path)
    return [convert_row_to_image_record(row) for row in table.to_pylist()], root

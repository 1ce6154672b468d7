"""JSON label files: lists of records, checked field by field; messages name the file and the record."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from ..errors import DataError
from ..shards import read_json


Record = Mapping[str, Any]
ADVICE = "Get the label file from the data set's authors."


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield (where it stands, record) of a JSON list of objects.

    Raises:
        DataError: the file is missing, is not JSON, is not a list, or an entry is not an object.
    """
    value = read_json(path)
    if not isinstance(value, list):
        raise DataError(f"{path} must hold a JSON list of records, found {describe_type(value)}. {ADVICE}")
    for number, record in enumerate(cast(list[Any], value), 1):
        where = f"{path}, record {number}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object, found {describe_type(record)}. {ADVICE}")
        yield where, cast(Record, record)


def describe_type(value: object) -> str:
    """Return what a JSON value is, for messages."""
    names = {"dict": "an object", "list": "a list", "str": "a text", "bool": "true or false", "NoneType": "null"}
    return names.get(type(value).__name__, "a number")


def _fail(where: str, record: Record, key: str, expected: str, advice: str) -> DataError:
    if key not in record:
        return DataError(f"{where}: `{key}` is missing (found: {', '.join(record)}). {advice}")
    found = "nothing" if record[key] == "" else describe_type(record[key])
    return DataError(f"{where}: `{key}` must be {expected}, found {found}. {advice}")


def get_identity(record: Record, key: str, where: str) -> str:
    """Return an identity: a number or a text; 7, 7.0 (as pandas writes numbers), "7" and "007" are the same one.

    Raises:
        DataError: it is missing, empty or of another type.
    """
    text = get_label(record, key, where)
    number = re.fullmatch(r"0*(\d+)", text, re.ASCII)
    return number[1] if number else text


def get_label(record: Record, key: str, where: str, advice: str = ADVICE) -> str:
    """Return a label: a number or a text as it stands, but 7 where a table wrote 7.0 for want of whole numbers.

    Raises:
        DataError: it is missing, empty or of another type.
    """
    value = record.get(key)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return re.sub(r"^(-?\d+)\.0+$", r"\1", value.strip(), flags=re.ASCII)
    raise _fail(where, record, key, "a number or a text that is not empty", advice)


def get_path(record: Record, key: str, where: str, advice: str = ADVICE) -> str:
    """Return an image path with forward slashes, below the data set folder.

    Raises:
        DataError: it is missing, empty, absolute or leads out of the folder.
    """
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _fail(where, record, key, "an image path", advice)
    path = value.strip().replace("\\", "/").removeprefix("./")
    if path.startswith("/") or ".." in path.split("/"):
        raise DataError(f"{where}: `{key}` {value!r} does not lie below the data set folder. {advice}")
    return path


def get_texts(record: Record, key: str, where: str, advice: str = ADVICE) -> list[str]:
    """Return a list of texts; one text stands for a list of one.

    Raises:
        DataError: it is missing or of another type.
    """
    value = record.get(key)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in cast(list[Any], texts)):
        raise _fail(where, record, key, "a list of texts", advice)
    return cast(list[str], texts)

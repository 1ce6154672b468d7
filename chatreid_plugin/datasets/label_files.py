"""Label files of strangers, checked as they are read: text lists, JSON records, MATLAB files.

SciPy's reader of MATLAB files is written in C and trusts the file: some damaged ones end the process that reads them,
and some of a few kB ask for terabytes. So it runs in a process of its own (``matlab_child.py``) with bounded memory.
"""

import atexit
import json
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import DataError
from ..regular_files import check_regular
from ..shards import read_json, read_text


Record = Mapping[str, Any]
ADVICE = "Get the label file from the data set's authors."
# What a MATLAB file may take. The largest published one (RAP v2) unpacks to 100 MB, and is copied when sent.
MOST_BYTES = 2 * 2**30


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, stripped text) of a list file, blank lines skipped.

    Raises:
        DataError: the file is missing or is not text.
    """
    if not path.exists():
        raise DataError(f"List file {path} is missing. Get it from the data set's authors.")
    lines = read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.strip()


def read_identities(path: Path) -> set[int]:
    """Return the identities of a list file: numbers, comma separated.

    Raises:
        DataError: the file is missing, or holds something else.
    """
    found: set[int] = set()
    for number, line in read_lines(path):
        for text in filter(None, (text.strip() for text in line.split(","))):
            if not text.isdecimal():
                raise DataError(f"{path}, line {number}: {text!r} is no identity; expected numbers and commas.")
            found.add(int(text))
    return found


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


@dataclass(slots=True)
class _Child:
    """The process that reads, once it was needed."""

    process: subprocess.Popen[bytes] | None = None

    def ask(self, path: Path, simplify: bool) -> Any:
        """Return a file's variables, or why there are none."""
        if self.process is None:
            script = str(Path(__file__).with_name("matlab_child.py"))
            # -P: the modules beside the script are not those that it imports. It ends when its input does.
            self.process = subprocess.Popen(
                [sys.executable, "-P", script, str(MOST_BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([str(path.resolve()), simplify]).encode() + b"\n")
            self.process.stdin.flush()
            (size,) = struct.unpack("<Q", self.process.stdout.read(8))
            return pickle.loads(self.process.stdout.read(size))
        except (OSError, struct.error, EOFError, pickle.UnpicklingError):
            self.end()
            return "SciPy crashed on it"

    def end(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


_CHILD = _Child()
atexit.register(_CHILD.end)


def read_matlab(path: Path, *, simplify: bool = False) -> dict[str, Any]:
    """Return a MATLAB file's variables.

    Args:
        path: the file.
        simplify: structures become dicts (fields in file order), and dimensions of one are squeezed.

    Raises:
        DataError: it is missing, no regular file, damaged, or asks for more memory than any published one.
    """
    try:
        check_regular(path)
        answer: Any = _CHILD.ask(path, simplify)
    except OSError as error:
        answer = str(error)
    if isinstance(answer, str):
        raise DataError(
            f"{path} cannot be read as a MATLAB file (version 5 to 7): {answer}. Get the published file again."
        )
    return answer

"""Arrays in .npz and .npy files and the names of their rows; what ``external`` reads from other programs.

Every fault is told in the user's words: which file, which names, what to save instead.
"""

import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile

from ..errors import DataError
from ..regular_files import check_regular
from .arrays import IntArray


Array = npt.NDArray[Any]
Names = tuple[str, ...]  # what one image or query may be called

EXAMPLES_SHOWN = 10
# A compressed array may be so much larger than its file, beyond the first size; features and scores never are.
MOST_UNPACKED = 2**30
MOST_RATIO = 100


def open_archive(path: Path, wanted: Sequence[str]) -> dict[str, Array]:
    """Return the arrays of an .npz that are among ``wanted``."""
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    what = "save one with numpy.savez(path, name=array, ...)"
    try:
        check_regular(path)
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, NpzFile):
            raise DataError(f"{path} is no .npz file but a single array; {what}.")
        with archive:
            return {name: _read_member(archive, name, path) for name in wanted if name in archive.files}
    except DataError:
        raise
    except Exception as error:  # a damaged file makes NumPy and zipfile raise whatever they stumble over
        # What NumPy says of other files is advice to allow pickles, which run whatever code they hold.
        reason = f" ({error})" if isinstance(error, OSError | BadZipFile | zlib.error) else ""
        raise DataError(
            f"{path} is no readable .npz file{reason}: empty, cut short or of another kind; {what}."
        ) from None


def _read_member(archive: NpzFile, name: str, path: Path) -> Array:
    _refuse_bomb(archive, name, path)
    try:
        return archive[name]
    except ValueError:
        raise DataError(
            f"{path}: `{name}` holds Python objects. Save names as np.array(list_of_texts) and numbers as an array of "
            "floats, all rows of one length."
        ) from None


def _refuse_bomb(archive: NpzFile, name: str, path: Path) -> None:
    """Refuse an array whose header promises more than the file holds, or that unpacks to far more than the file.

    NumPy takes the memory that the header asks for before it reads a value.
    """
    assert archive.zip is not None  # it is open
    member = archive.zip.getinfo(name if name in archive.zip.namelist() else f"{name}.npy")
    with archive.zip.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        left = member.file_size - file.tell()
    if dtype.hasobject:
        return  # NumPy refuses it
    promised = math.prod(shape) * max(1, dtype.itemsize)  # names of no length take memory as well
    here = min(member.compress_size, path.stat().st_size)  # the archive may lie of both of its sizes
    packed = member.file_size > MOST_UNPACKED and member.file_size > MOST_RATIO * here
    if promised > left or packed:
        raise DataError(
            f"{path}: `{name}` says that it has {promised:,} bytes, but the file has {path.stat().st_size:,}. It was "
            "damaged or made to fill the memory."
        )


def map_array(path: Path) -> Array:
    """Return the array of an .npy without reading it."""
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    try:
        check_regular(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # a damaged file makes NumPy raise whatever it stumbles over
        raise DataError(
            f"{path} is no readable .npy file of numbers: empty, cut short or of another kind; save one with "
            "numpy.save(path, scores), scores being an array of floats (queries, gallery)."
        ) from None


@dataclass(frozen=True, slots=True)
class FileNames:
    """The names in a file, for its rows or its columns, and what of them is missing or ambiguous."""

    path: Path
    names: list[str]

    def find_rows(self, wanted: Sequence[Names], take: Callable[[int], Array]) -> list[int | None]:
        """Return where each of ``wanted`` is; ``take`` returns the values there, to compare those of a name's double.

        Raises:
            DataError: a name that stands there twice with different values.
        """
        rows: dict[str, int] = {}
        doubles: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            if rows.setdefault(name, row) != row:
                doubles.setdefault(name, []).append(row)
        found = [next((rows[name] for name in called if name in rows), None) for called in wanted]
        asked = [self.names[row] for row in found if row is not None]
        unlike = [
            name
            for name in dict.fromkeys(asked)
            if any(not np.array_equal(take(rows[name]), take(row)) for row in doubles.get(name, ()))
        ]
        if unlike:
            raise DataError(
                f"{self.path} has {len(unlike)} name(s) twice or more with different values, and it is unknown which "
                f"count:{_list_lines(unlike)}\nKeep one of each."
            )
        return found

    def explain(self, name: str) -> str:
        """Say how the file calls what may be the same image, or anything."""
        last = name.rpartition("/")[2]
        alike = next((one for one in self.names if one.replace("\\", "/").rpartition("/")[2] == last), None)
        example = alike or next(iter(self.names), None)
        if example is None:
            return "The file has no names at all."
        return f"The file says {example!r}, where {name!r} was looked for."


def _list_lines(names: Sequence[str]) -> str:
    more = f"\n  ... and {len(names) - EXAMPLES_SHOWN} more" if len(names) > EXAMPLES_SHOWN else ""
    return "".join(f"\n  {name}" for name in names[:EXAMPLES_SHOWN]) + more


def read_names(names: Array, path: Path) -> FileNames:
    """Return an array of names as texts, also where they were saved as bytes."""
    if names.ndim != 1:
        raise DataError(f"{path}: names must be (N,), one for each row, not {names.shape}.")
    return FileNames(path, [os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in names.tolist()])


def refuse_missing(
    what: str, sides: Sequence[tuple[str, FileNames, Sequence[Names], Sequence[int | None]]]
) -> tuple[IntArray, ...]:
    """Return the rows that were found on each side (its name, names, wanted ones, rows); refuse if some were not.

    Raises:
        DataError: naming some of each side.
    """
    parts: list[str] = []
    for side, names, wanted, rows in sides:
        missing = [called[0] for called, row in zip(wanted, rows, strict=True) if row is None]
        if missing:
            parts.append(f"{len(missing)} of {len(wanted)} {side}:{_list_lines(missing)}\n{names.explain(missing[0])}")
    if parts:
        raise DataError(
            f"{sides[0][1].path} lacks the {what} of " + "\nand of ".join(parts) + "\nPaths are as in the manifest, "
            "relative to the data set's folder; captions are <path>#<number>."
        )
    return tuple(np.array(rows, dtype=np.int64) for _, _, _, rows in sides)

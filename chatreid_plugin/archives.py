"""Arrays in .npz and .npy files and the names of their rows: features and scores that other programs wrote.

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

from .errors import DataError
from .regular_files import check_regular


# Shapes are in the docstrings of what takes them.
Array = npt.NDArray[Any]
ScoreArray = npt.NDArray[np.float32]  # scores, similarities and features, as models give them
FloatArray = npt.NDArray[np.float64]  # metrics and what they are computed from
IntArray = npt.NDArray[np.int64]  # indices, ranks and labels
BoolArray = npt.NDArray[np.bool_]  # masks
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
) -> tuple[npt.NDArray[np.int64], ...]:
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


def advise_shape(found: tuple[int, ...], wanted: tuple[int | None, ...], name: str) -> str:
    """Say how an array of a wrong shape gets the wanted one, where it can be told; None is any length."""

    def fits(shape: tuple[int, ...]) -> bool:
        return len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))

    if fits(found[::-1]):
        return f" It is transposed: give {name}.T."
    if fits(tuple(side for side in found if side != 1)):
        return f" It has sides of length 1 too many: give {name}.squeeze()."
    if len(found) == 4 and fits(found[:2]):
        return f" It is a map of features: give its mean over the image, {name}.mean(axis=(2, 3))."
    return ""


def check_shape(path: Path, name: str, array: Array, wanted: tuple[int, int | None], named_by: str) -> None:
    """Refuse an array that does not have a row for each name, or holds no real numbers: each with its remedy."""
    if array.ndim != 2 or array.shape[0] != wanted[0] or wanted[1] not in (None, array.shape[1]):
        sides = ", ".join("D" if side is None else str(side) for side in wanted)
        advice = advise_shape(array.shape, wanted, name) or f" Save a row for each name in {named_by}."
        raise DataError(f"{path}: {name} have shape {array.shape}; expected ({sides}), as {named_by}.{advice}")
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"{path}: {name} are of type {array.dtype}; save real numbers, such as {name}.astype('float32')."
        )


def read_features(path: Path, sides: Sequence[tuple[str, Sequence[Names]]]) -> list[Array]:
    """Return the features (N, D) of what is called so, as they stand in the file, for each side.

    The file has ``paths`` (N,) and ``features`` (N, D), as ``chatreid embed`` writes them; or ``query_paths``,
    ``query_features``, ``gallery_paths`` and ``gallery_features``, where two sides were encoded apart.

    Args:
        path: the .npz.
        sides: what each is called in messages, and what its images may be called in the file: the queries and the
            gallery, or one alone.

    Raises:
        DataError: no such file or arrays, shapes or types that do not fit, names that are missing or stand there twice
            with different features, or features that are not finite or all zero.
    """
    names = ("paths", "features")
    apart = tuple(f"{side}_{name}" for side in ("query", "gallery") for name in names) if len(sides) == 2 else ()
    arrays = open_archive(path, names + apart)
    prefixes = ("query_", "gallery_") if apart and all(name in arrays for name in apart) else ("",) * len(sides)
    if any(prefix + name not in arrays for prefix in prefixes for name in names):
        other = f", or {', '.join(f'`{name}`' for name in apart)}" if apart else ""
        raise DataError(
            f"{path} is no .npz with arrays `paths` and `features`{other} "
            f"(found: {', '.join(arrays) or 'none of them'})."
        )
    found: list[tuple[str, FileNames, Sequence[Names], list[int | None]]] = []
    for (side, wanted), prefix in zip(sides, prefixes, strict=True):
        features, called = arrays[f"{prefix}features"], arrays[f"{prefix}paths"]
        file_names = read_names(called, path)
        check_shape(path, f"{prefix}features", features, (len(file_names.names), None), f"{prefix}paths")
        found.append((side, file_names, wanted, file_names.find_rows(wanted, features.__getitem__)))
    rows = refuse_missing("features", found)
    taken = [arrays[f"{prefix}features"][places] for prefix, places in zip(prefixes, rows, strict=True)]
    widths = [features.shape[1] for features in taken]
    if len(set(widths)) > 1:
        raise DataError(f"{path}: query features have {widths[0]} columns and gallery {widths[1]}.")
    for (_, wanted), features in zip(sides, taken, strict=True):
        _check_features(features, wanted, path)
    return taken


def _check_features(features: Array, names: Sequence[Names], path: Path) -> None:
    """Refuse features without a direction."""
    faults = (
        (~np.isfinite(features).all(axis=1), "NaN or infinite", "a ranking would mean nothing"),
        (~features.any(axis=1), "all zero", "they have no direction, and so no cosine similarity"),
    )
    for wrong, fault, reason in faults:
        if wrong.any():
            first = names[int(np.flatnonzero(wrong)[0])][0]
            raise DataError(
                f"{path}: the features of {int(wrong.sum())} of {len(names)} image(s) are {fault}, first of {first}; "
                f"{reason}. Check the model that gave them."
            )


def normalise(features: Array) -> npt.NDArray[np.float32]:
    """Return L2-normalised rows (N, D), so that the dot product is the cosine."""
    values = features.astype(np.float64)
    # Brought to about 1 first, by a power of two and so exactly: no square is too large or too small for float64 then.
    values = np.ldexp(values, -np.frexp(np.abs(values).max(axis=1, keepdims=True, initial=0.0))[1])
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.maximum(lengths, 1e-300)).astype(np.float32)

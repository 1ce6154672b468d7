"""MATLAB files (version 4 to 7) of strangers: what comes out is bounded, and every fault is one message."""

import struct
import zlib
from pathlib import Path
from typing import Any, cast

from scipy.io import loadmat

from ...errors import DataError
from ...regular_files import read_regular


# The largest published label file (RAP v2) holds 100 MB; a file of some kB may unpack to terabytes.
MOST_BYTES = 2**30
_HEADER_BYTES = 128
_COMPRESSED = 15
_BLOCK = 2**20


def read_matlab(path: Path, *, simplify: bool = False) -> dict[str, Any]:
    """Return a MATLAB file's variables.

    Args:
        path: the file.
        simplify: structures become dicts (fields in file order), and dimensions of one are squeezed.

    Raises:
        DataError: it is missing, no regular file, damaged, or unpacks to more than any published one.
    """
    try:
        _refuse_bomb(read_regular(path))
        return cast(dict[str, Any], loadmat(str(path), simplify_cells=simplify))
    except DataError as error:
        raise DataError(f"{path} {error}") from None
    except Exception as error:  # a damaged file makes scipy raise whatever it stumbles over
        raise DataError(
            f"{path} cannot be read as a MATLAB file (version 5 to 7): {str(error) or type(error).__name__}. "
            "Get the published file again."
        ) from None


def _refuse_bomb(content: bytes) -> None:
    """Refuse a file of version 5 whose compressed elements unpack to more than ``MOST_BYTES``."""
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    place, total = _HEADER_BYTES, 0
    while order and place + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}ii", content, place)
        place += 8
        if size < 0:
            return
        if kind == _COMPRESSED:
            total += _measure(memoryview(content)[place : place + size], MOST_BYTES - total)
        if total > MOST_BYTES:
            raise DataError(f"unpacks to more than {MOST_BYTES:,} bytes, as no published label file does.")
        place += size


def _measure(packed: memoryview, most: int) -> int:
    """Return how many bytes a zlib stream unpacks to, or some number above ``most``."""
    stream = zlib.decompressobj()
    count, rest = 0, bytes(packed)
    while rest and not stream.eof and count <= most:
        count += len(stream.decompress(rest, _BLOCK))
        rest = stream.unconsumed_tail
    return count

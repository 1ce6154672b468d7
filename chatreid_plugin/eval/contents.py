"""What is in the image files, so that saved scores of other pixels under the same names are not taken for these.

The bytes count and not the date, so that images may be copied or moved; 100,000 crops of 8 kB take 1.3 s from the disk
cache, and whatever is scored is read anyway. A manifest's own hashes are of the day when it was made.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from ..errors import DataError
from ..records import ImageRecord
from .distributed import Processes


THREADS = 8
FILES_A_JOB = 256


def hash_images(
    records: Sequence[ImageRecord], image_root: Path, processes: Processes | None = None
) -> dict[str, str]:
    """Return image id to a hash of the file's bytes; several processes share the work.

    Raises:
        DataError: a file cannot be read.
    """
    processes = processes or Processes()
    share = processes.take_share(records)

    def hash_some(start: int) -> dict[str, str]:
        return {r.image_id: _hash_file(image_root / r.path) for r in share[start : start + FILES_A_JOB]}

    own: dict[str, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(hash_some, range(0, len(share), FILES_A_JOB)):
            own |= part
    return {image_id: digest for part in processes.gather(own) for image_id, digest in part.items()}


def _hash_file(path: Path) -> str:
    try:
        return xxhash.xxh3_64_hexdigest(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None

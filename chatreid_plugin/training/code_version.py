"""The version of the code that decides a record's tokens, for keys of ``datasets``' map cache.

``datasets`` names a map's result after the mapped object's fields, not after the code behind it: a function edited in
place would be served the tokens of the one before.
"""

from functools import cache
from pathlib import Path

import xxhash

from .. import __version__


PACKAGE = Path(__file__).parents[1]


@cache
def find_code_version(package: Path = PACKAGE) -> str:
    """Return the plugin's version and a hash of its source: prompts, answers, image policies and training.

    Args:
        package: the package's folder.
    """
    digest = xxhash.xxh3_64()
    for file in sorted([*package.glob("*.py"), *package.glob("training/*.py")]):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return f"{__version__}+{digest.hexdigest()}"

"""What the disk of an ``output_dir`` refuses, in words that say what to do."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DataError


@contextmanager
def explain_failures(path: Path) -> Generator[None, None, None]:
    """Raise DataError, with what to do, for whatever the disk refuses."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"The scores in {path} cannot be read or kept: {error}. Make room on the disk of output_dir or check the "
            "permissions, then run the same command again: it goes on with the queries that are not finished."
        ) from None

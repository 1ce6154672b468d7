"""The ``output_dir`` of a run: made, known to be writable, and kept from other runs."""

import fcntl
import io
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError, DataError


logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"


def open_locked(path: Path) -> io.FileIO:
    """Open a file of an ``output_dir`` for appending, for this process alone until it is closed.

    Raises:
        ConfigError: another process has it, or it cannot be written.
    """
    try:
        file = path.open("a+b", buffering=0)  # nothing is left to write when it is closed
    except OSError as error:
        raise ConfigError(
            f"output_dir: {path.parent} cannot be written into: {error}. Check its permissions and its disk, or set "
            "another output_dir."
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"output_dir: another evaluation is writing into {path.parent} (it holds {path.name}). "
            "Wait for it or stop it, or set another output_dir."
        ) from None
    except OSError as error:  # some network disks have no locks
        logger.warning("%s cannot be locked (%s): see to it that no other run uses this output_dir.", path, error)
    return file


def make_folder(folder: Path) -> None:
    """Make an ``output_dir`` unless it is there.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # Path.is_file raises what it meets in a folder that may not be entered.
        why = "is a file" if os.path.isfile(folder) else f"cannot be made: {error}"
        raise ConfigError(f"output_dir: {folder} {why}. Set another output_dir.") from None


@contextmanager
def hold_folder(folder: Path) -> Generator[None, None, None]:
    """Keep other evaluations out of an ``output_dir`` as long as the block runs; so it is known to be writable, too.

    What is locked is an empty file, which stays: while one process removed it, another could lock it and a third make
    it anew.

    Raises:
        ConfigError: another evaluation has the folder, or it cannot be written into.
    """
    with open_locked(folder / LOCK_NAME):
        yield


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

"""Files that a process locks as long as it works in a folder; the lock ends with the process, however it ends."""

import fcntl
import io
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ConfigError


logger = logging.getLogger(__name__)

# What is locked is an empty file, which stays: while one process removed it, another could lock it and a third make
# it anew.
LOCK_NAME = ".lock"


def make_folder(folder: Path, key: str = "output_dir") -> None:
    """Make a folder unless it is there; ``key``: the setting that named it.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # Path.is_file raises what it meets in a folder that may not be entered.
        why = "is a file" if os.path.isfile(folder) else f"cannot be made: {error}"
        raise ConfigError(f"{key}: {folder} {why}. Set another {key}.") from None


def open_locked(path: Path, who: str, key: str = "output_dir") -> io.FileIO:
    """Open a file of a folder for appending, for this process alone until it is closed.

    Args:
        path: the file.
        who: what writes there, e.g. ``evaluation``, for the message.
        key: the setting that named the folder.

    Raises:
        ConfigError: another process has it, or it cannot be written.
    """
    try:
        file = path.open("a+b", buffering=0)  # nothing is left to write when it is closed
    except OSError as error:
        raise ConfigError(
            f"{key}: {path.parent} cannot be written into: {error}. Check its permissions and its disk, or set "
            f"another {key}."
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"{key}: another {who} is writing into {path.parent} (it holds {path.name}). "
            f"Wait for it or stop it, or set another {key}."
        ) from None
    except OSError as error:  # some network disks have no locks
        logger.warning("%s cannot be locked (%s): see to it that no other run uses this folder.", path, error)
    return file


@contextmanager
def hold_folder(folder: Path, who: str) -> Generator[None]:
    """Keep others out of a folder as long as the block runs; so it is known to be writable, too.

    Raises:
        ConfigError: another process has the folder, or it cannot be written into.
    """
    with open_locked(folder / LOCK_NAME, who):
        yield


@contextmanager
def share_folder(folder: Path) -> Generator[None]:
    """Be one of several that write files of their own into a folder, as long as the block runs."""
    make_folder(folder)
    with (folder / LOCK_NAME).open("a+b", buffering=0) as file:
        with suppress(OSError):  # some network disks have no locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def try_folder(folder: Path) -> Generator[bool]:
    """Yield whether nobody shares a folder; nobody begins to as long as the block runs."""
    if not folder.is_dir():
        yield True
        return
    with (folder / LOCK_NAME).open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True

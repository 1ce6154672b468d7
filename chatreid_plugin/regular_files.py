"""Files of strangers: a pipe would be waited for, a device read, for ever; and a name may lead anywhere."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def check_regular(path: Path) -> None:
    """Refuse what a library would open by its name though it is no regular file, nor a link to one.

    Raises:
        OSError: it is missing, or is a folder, a pipe, a socket or a device.
    """
    _check_mode(os.stat(path).st_mode, path)


def _check_mode(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe or device, not a file", str(path))


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, if it is a regular file or a link to one.

    Raises:
        OSError: it is missing or cannot be read, or is a folder, a pipe, a socket or a device.
    """
    # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_mode(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: see ``open_regular``.
    """
    with open_regular(path) as file:
        return file.read()


def leaves_root(path: str) -> bool:
    """Return whether a path names something that is not below the folder it is relative to."""
    parts = path.replace("\\", "/").split("/")
    return os.path.isabs(path) or ".." in parts or "\0" in path

"""MATLAB files (version 4 to 7) of strangers: read in a process of its own, with bounded memory.

SciPy's reader is written in C and trusts the file: some damaged ones end the process that reads them, and some of a
few kB ask for terabytes.
"""

import atexit
import json
import pickle
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..regular_files import check_regular


# What a file may take. The largest published label file (RAP v2) unpacks to 100 MB, and is copied when sent.
MOST_BYTES = 2 * 2**30


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

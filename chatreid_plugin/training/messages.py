"""Our messages on their way from the processes that torchrun starts to the command that the user typed."""

import os
from pathlib import Path

from ..printing import make_printable


# Names a file; the environment is what torchrun hands on to its processes.
VARIABLE = "CHATREID_MESSAGES"


def pass_on_message(message: str) -> None:
    """Write down a message for the command that started torchrun; nothing where there is none."""
    path = os.environ.get(VARIABLE)
    if not path or not Path(path).parent.is_dir():
        return
    # One short write at the end of the file: lines of several processes do not mix (POSIX, O_APPEND).
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(make_printable(message).replace("\n", "\v") + "\n")


def read_messages(path: Path) -> list[str]:
    """Return the different messages of all processes in the order they came."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [line.replace("\v", "\n") for line in dict.fromkeys(lines) if line]

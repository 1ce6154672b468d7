"""How a command ends early: by an error that says what happened, where and what to do, or by a signal.

Exit codes of every command: 0 done, 1 unexpected, 2 configuration, 3 data, 4 model or server, 130 interrupted.
"""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from .printing import make_printable


INTERRUPTED = 130  # exit code of a command that Ctrl-C or SIGTERM ended, as shells have it


class ChatReIDError(Exception):
    """Base of all errors meant for the user; the command line prints its message alone, without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        return make_printable(super().__str__())


class ConfigError(ChatReIDError):
    """A YAML key, a command-line value or a combination of settings is wrong."""

    exit_code = 2


class DataError(ChatReIDError):
    """A data set, image, shard or record is missing or invalid."""

    exit_code = 3


class UpstreamError(ChatReIDError):
    """A model checkpoint, LLaMA-Factory or a server does not behave as this version of the plugin needs."""

    exit_code = 4


@contextmanager
def end_on_sigterm() -> Generator[None, None, None]:
    """Let SIGTERM end a command as Ctrl-C does: work is kept, folders are cleaned up, advice is printed how to go on.

    Service managers, schedulers and `docker stop` send it; what a shell starts in the background, or what runs in some
    CI, ignores SIGINT from the start and hears SIGTERM alone.

    Not for one of torchrun's processes, which may be waiting for the others in code that no exception ends: there
    SIGTERM kills, and torchrun reports it.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_: int, frame: FrameType | None) -> None:
    # As Ctrl-C does, also where asyncio has a handler of its own; where SIGINT is ignored there is none to call.
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signal.SIGINT, frame)
    else:
        raise KeyboardInterrupt

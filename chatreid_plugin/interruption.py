"""SIGTERM ends a command as Ctrl-C does: work is kept, folders are cleaned up, and the advice how to go on is printed.

Service managers, schedulers and `docker stop` send SIGTERM; what a shell starts in the background, or what runs in
some CI, ignores SIGINT from the start and hears SIGTERM alone.
"""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def end_on_sigterm() -> Generator[None, None, None]:
    """Raise KeyboardInterrupt where SIGTERM arrives as long as the block runs.

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

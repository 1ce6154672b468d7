"""Worker processes on this machine: how they start, how they end, and why they could not."""

import multiprocessing
import os
import threading
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from .errors import ConfigError, DataError


@contextmanager
def open_pool(workers: int) -> Generator[ProcessPoolExecutor, None, None]:
    """Start worker processes, which load their modules meanwhile; the block ends when they have.

    Args:
        workers: how many.

    Raises:
        ConfigError: no worker could begin, as each one ran the script that called this once more.
        DataError: a worker was killed.
    """
    # Spawned, not forked: pyarrow has started threads, and a fork of them may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    started: list[Any] = []
    try:
        # Each job that finds no idle process starts one.
        for _ in range(workers):
            started.append(pool.submit(os.getpid))
        yield pool
    except BrokenProcessPool:
        pool.shutdown(wait=True, cancel_futures=True)
        if not any(job.done() and not job.cancelled() and job.exception() is None for job in started):
            raise ConfigError(
                "The worker processes ended as soon as they had started: Python runs the calling script again in each "
                'of them. Put its calls below `if __name__ == "__main__":`, in a file, or set workers=1.'
            ) from None
        raise DataError(
            "A worker process was killed, most likely for want of memory. Run again with fewer `workers`; what was "
            "finished is kept."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Let a worker end when its parent was killed; it would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

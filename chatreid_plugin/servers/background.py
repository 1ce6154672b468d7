"""An event loop in a thread of its own, for callers that are not asynchronous or have a loop already (a web page)."""

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar


Result = TypeVar("Result")


class BackgroundLoop:
    """Runs coroutines until it is forgotten; connections stay open from one to the next."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(self._loop,), daemon=True, name="chatreid-requests").start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return what the coroutine returns; an interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def end_with(self, owner: object, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """End the loop, after a last coroutine, as soon as ``owner`` is forgotten; ``close`` must not refer to it."""
        weakref.finalize(owner, _end, self._loop, close).atexit = False  # at exit the thread ends by itself


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def end() -> None:
        try:
            await close()
        finally:
            loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)

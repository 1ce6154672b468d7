"""Coroutines run from callers that are not asynchronous."""

import asyncio
import gc
import threading
import time

import pytest

from chatreid_plugin.servers.background import BackgroundLoop


class Owner:
    pass


def count_threads() -> int:
    return sum(thread.name == "chatreid-requests" for thread in threading.enumerate())


def test_work_is_done_from_inside_another_loop_and_keeps_its_own() -> None:
    background = BackgroundLoop()

    async def name_loop() -> int:
        return id(asyncio.get_running_loop())

    async def outside() -> tuple[int, int]:
        return background.run(name_loop()), id(asyncio.get_running_loop())

    inner, outer = asyncio.run(outside())
    assert inner != outer
    assert background.run(name_loop()) == inner


def test_error_reaches_the_caller() -> None:
    async def fail() -> None:
        raise ValueError("told so")

    with pytest.raises(ValueError, match="told so"):
        BackgroundLoop().run(fail())


def test_loop_ends_after_closing_when_its_owner_is_forgotten() -> None:
    owner, closed = Owner(), threading.Event()
    before = count_threads()

    async def close() -> None:
        closed.set()

    background = BackgroundLoop()
    background.end_with(owner, close)
    assert count_threads() == before + 1
    del owner
    gc.collect()
    assert closed.wait(5)
    deadline = time.monotonic() + 5
    while count_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert count_threads() == before

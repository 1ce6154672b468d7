"""When the next request may be sent."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from chatreid_plugin.servers.pace import Pace, read_retry_after


def measure(pace: Pace, *tokens: int) -> float:
    """Return the seconds until requests of so many tokens each have passed, all asked for at once."""

    async def send_all() -> None:
        await asyncio.gather(*(pace.wait(count) for count in tokens))

    start = time.monotonic()
    asyncio.run(send_all())
    return time.monotonic() - start


def test_pace_keeps_the_limit_of_tokens() -> None:
    # 60,000 a minute are 1000 a second: the last request waits for the first three.
    assert 0.3 <= measure(Pace(None, 60_000), 100, 50, 150, 999) < 0.6


def test_pace_without_limits_does_not_wait() -> None:
    assert measure(Pace(None, None), 10**9, 10**9) < 0.1


def test_pace_waits_for_tokens_beyond_the_estimate() -> None:
    pace = Pace(None, 60_000)
    pace.charge(200)
    pace.charge(-5000)
    assert 0.2 <= measure(pace, 1) < 0.5


def test_pause_holds_back_those_already_waiting() -> None:
    pace = Pace(600, None)

    async def run() -> list[float]:
        start, passed = time.monotonic(), list[float]()

        async def send() -> None:
            await pace.wait(1)
            passed.append(time.monotonic() - start)

        waiting = [asyncio.create_task(send()) for _ in range(3)]
        await asyncio.sleep(0.05)
        pace.pause(0.4)
        await asyncio.gather(*waiting)
        return passed

    first, second, third = asyncio.run(run())
    assert first < 0.05 and second >= 0.45 and third >= 0.55


def test_pause_is_news_once() -> None:
    pace = Pace(None, None)
    assert [pace.pause(5), pace.pause(5), pace.pause(1), pace.pause(60)] == [True, False, False, True]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("7", 7.0),
        (" 0 ", 0.0),
        ("0.5", 0.5),
        ("-1", None),
        ("inf", None),
        (None, None),
        ("soon", None),
        ("Mon, 01 Jan 2024 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_read(value: str | None, expected: float | None) -> None:
    assert read_retry_after(value) == expected


def test_retry_after_may_be_a_date() -> None:
    value = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert read_retry_after(value) == pytest.approx(60, abs=2)

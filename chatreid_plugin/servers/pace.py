"""When the next request may be sent: limits per minute, and a pause for all when the endpoint asks for one."""

import asyncio
import math
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


# Seconds; requests on their way together are refused together.
_MOMENT = 1.0


class Pace:
    """Spaces requests evenly, so that no window of a minute ever holds more than the limits allow.

    Attributes:
        requests_per_minute: None for no limit.
        tokens_per_minute: None for no limit.
    """

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self.requests_per_minute = requests_per_minute
        self.tokens_per_minute = tokens_per_minute
        self._next = 0.0
        self._resume = 0.0
        # Waiters are let through in order of arrival; only the first one watches the clock.
        self._gate = asyncio.Lock()

    async def wait(self, tokens: int) -> None:
        """Return when a request of so many tokens (estimated, answer included) may be sent."""
        async with self._gate:
            while (delay := max(self._next, self._resume) - time.monotonic()) > 0:
                await asyncio.sleep(delay)
            self._next = time.monotonic()
            if self.requests_per_minute is not None:
                self._next += 60 / self.requests_per_minute
            if self.tokens_per_minute is not None:
                self._next = max(self._next, time.monotonic() + 60 * tokens / self.tokens_per_minute)

    def charge(self, tokens: int) -> None:
        """Delay the next request for tokens that an answer took beyond the estimate."""
        if self.tokens_per_minute is not None and tokens > 0:
            self._next = max(self._next, time.monotonic()) + 60 * tokens / self.tokens_per_minute

    def pause(self, seconds: float) -> bool:
        """Hold back every request for so long; return whether that is news, not what others heard a moment before."""
        moment = time.monotonic() + seconds
        is_news = moment > self._resume + _MOMENT
        self._resume = max(self._resume, moment)
        return is_news


def read_retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or an HTTP date (RFC 9110, 10.2.3); None if unreadable."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return seconds if math.isfinite(seconds) and seconds >= 0 else None
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    # "-0000" gives a time without a zone, which means UTC.
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())

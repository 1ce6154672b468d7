"""One request to an OpenAI-compatible server, sent until it is answered; faults sorted by whom they concern."""

import asyncio
import sys
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, AsyncOpenAI
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type
from tenacity.wait import wait_exponential_jitter
from tqdm import tqdm

from ..errors import UpstreamError
from .key import read_key
from .pace import Pace, read_retry_after


# Seconds before the first retry, doubled each time, with as much jitter, up to the longest.
FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0
# A Retry-After beyond this is a quota of the day rather than of the minute.
LONGEST_PAUSE = 600.0
_LONGEST_REASON = 300
# A shorter key is a word for servers that need none, e.g. ``none``, and words are in answers.
_SHORTEST_SECRET = 12


class TemporaryFailure(Exception):
    """The server did not answer this time.

    Attributes:
        pause: seconds for which it wants no request at all; None if it did not say.
        is_overload: it wants fewer requests (status 429), so all workers have to wait.
        is_slow: it did not answer in time.
    """

    def __init__(
        self, reason: str, pause: float | None = None, *, is_overload: bool = False, is_slow: bool = False
    ) -> None:
        super().__init__(reason)
        self.pause = pause
        self.is_overload = is_overload
        self.is_slow = is_slow


class RejectedRequest(Exception):
    """The server will never take this request (status 400, 413, 422, ...)."""


class BrokenAnswer(Exception):
    """The answer is no JSON."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server is and how it is asked.

    Attributes:
        base_url: up to ``/v1``.
        model: name of the model, for messages.
        api_key_variable: environment variable that holds the key.
        timeout: seconds for one attempt.
        retries: further attempts after failures that may pass, and as many others after time-outs, so that a slow
            server is not taken for one that refuses.
        section: what the settings belong to, for messages, e.g. ``the captioning block``.
        key_setting: full name of the setting ``api_key_variable``, for messages.
    """

    base_url: str
    model: str
    api_key_variable: str
    timeout: float
    retries: int
    section: str
    key_setting: str


def _get_failure(state: RetryCallState) -> TemporaryFailure:
    return cast(TemporaryFailure, state.outcome.exception() if state.outcome else None)


class ServerClient:
    """A server that is asked within its limits.

    Attributes:
        address: where it is.
        host: for messages.
        pace: when the next request may be sent.
    """

    def __init__(self, address: ServerAddress, pace: Pace | None = None) -> None:
        """Read the key.

        Raises:
            ConfigError: see ``read_key``.
        """
        self.address = address
        self.host = urlsplit(address.base_url).netloc
        self.pace = pace or Pace(None, None)
        self._key = read_key(address.api_key_variable, address.base_url, address.key_setting)
        # Retries and time limits are ours: one 429 has to hold back all workers.
        self._client = AsyncOpenAI(api_key=self._key or "none", base_url=address.base_url, max_retries=0, timeout=None)
        self._backoff = wait_exponential_jitter(multiplier=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def ask(self, path: str, body: dict[str, Any] | None, tokens: int = 0) -> object:
        """Send a request until it is answered; the wait of a 429 is everybody's.

        Args:
            path: below the base URL, e.g. ``/chat/completions``.
            body: JSON to post; None to get the path.
            tokens: what it will cost by estimate, for limits in tokens.

        Returns:
            The decoded answer, without a key of 12 characters or more should the server repeat it.

        Raises:
            BrokenAnswer: the answer is no JSON; not retried, as the request may have cost money.
            RejectedRequest: the server does not take this request.
            TemporaryFailure: no answer after all retries.
            UpstreamError: no request will ever be answered: wrong key, wrong model, no credit.
        """
        failures = {True: 0, False: 0}

        def is_over(state: RetryCallState) -> bool:
            is_slow = _get_failure(state).is_slow
            failures[is_slow] += 1
            return failures[is_slow] > self.address.retries

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(TemporaryFailure),
            stop=is_over,
            wait=self._choose_wait,
            reraise=True,
        )
        return await retrying(self._send, path, body, tokens)

    def _choose_wait(self, state: RetryCallState) -> float:
        failure, pause = _get_failure(state), self._backoff(state)
        if failure.pause is None and not failure.is_overload:
            return pause
        # Many servers say 1 second however long they are busy, which would end the retries at once.
        pause = max(pause, failure.pause or 0)
        if self.pace.pause(pause):
            tqdm.write(f"{self.host}: {failure}; all requests wait {pause:.0f} s", file=sys.stderr)
        return 0

    async def _send(self, path: str, body: dict[str, Any] | None, tokens: int) -> object:
        await self.pace.wait(tokens)
        try:
            async with asyncio.timeout(self.address.timeout):
                if body is None:
                    answer = await self._client.get(path, cast_to=object)
                else:
                    answer = await self._client.post(path, cast_to=object, body=body)
        except TimeoutError:
            raise TemporaryFailure(f"no answer within {self.address.timeout:g} s", is_slow=True) from None
        except APIStatusError as error:
            raise self._judge(error) from None
        except APIConnectionError as error:
            raise TemporaryFailure(f"the connection failed ({error.__cause__ or error})") from None
        except ValueError as error:
            raise BrokenAnswer(f"broken JSON: {error}") from None
        return self._hide_in_answer(answer) if len(self._key) >= _SHORTEST_SECRET else answer

    def _hide_key(self, text: str) -> str:
        """Replace the key, should the server repeat it; done before anything else sees what it says."""
        return text.replace(self._key, "[key]") if self._key else text

    def _hide_in_answer(self, value: object) -> object:
        """Return decoded JSON with the key replaced in its texts; names and numbers stay."""
        if isinstance(value, str):
            return self._hide_key(value)
        if isinstance(value, list):
            return [self._hide_in_answer(part) for part in cast(list[object], value)]
        if isinstance(value, dict):
            return {name: self._hide_in_answer(part) for name, part in cast(dict[str, object], value).items()}
        return value

    def _judge(self, error: APIStatusError) -> Exception:
        """Return what an HTTP error means: for now, for this request, or for all."""
        status, body, address = error.status_code, error.body, self.address
        message = cast(dict[str, Any], body).get("message") if isinstance(body, dict) else None
        # A gateway's error is a whole page of HTML.
        reason = " ".join(f"{status}: {self._hide_key(str(message or error.message))}".split())[:_LONGEST_REASON]
        if status in (401, 403):
            return UpstreamError(
                f"{self.host} refuses the key ({reason}). Set the environment variable "
                f"{address.api_key_variable} to a key that may use this model."
            )
        if status in (404, 405):
            return UpstreamError(
                f"{self.host} does not know the model {address.model!r}, or base_url is wrong ({reason}). Check "
                f"both in {address.section}."
            )
        if error.code == "insufficient_quota":
            return UpstreamError(
                f"{self.host} has no credit left for this key ({reason}). Add credit, then run again."
            )
        if status not in (408, 409, 429) and status < 500:
            return RejectedRequest(reason)
        pause = read_retry_after(error.response.headers.get("retry-after"))
        if pause is not None and pause > LONGEST_PAUSE:
            return UpstreamError(
                f"{self.host} wants no request for {pause / 60:.0f} minutes ({reason}). Run again then."
            )
        return TemporaryFailure(reason, pause, is_overload=status == 429)

"""One request to an OpenAI-compatible server, sent until it is answered; faults sorted by whom they concern."""

import asyncio
import json
import sys
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urljoin, urlsplit

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type
from tenacity.wait import wait_exponential_jitter
from tqdm import tqdm

from ..errors import UpstreamError
from ..printing import make_printable
from .answers import BrokenAnswer, parse_answer, read_content
from .key import read_headers, read_key
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
        headers = {"Authorization": f"Bearer {self._key or 'none'}", **read_headers(address.base_url)}
        # Time limits are ours; redirects would take images where nobody sent them; bombs come compressed.
        self._client = httpx.AsyncClient(
            headers={**headers, "Accept": "application/json", "Accept-Encoding": "identity"},
            timeout=None,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            follow_redirects=False,
        )
        self._backoff = wait_exponential_jitter(multiplier=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def ask(self, path: str, body: dict[str, Any] | None, tokens: int = 0) -> object:
        """Send a request until it is answered; the wait of a 429 is everybody's.

        Args:
            path: below the base URL, e.g. ``/chat/completions``.
            body: JSON to post; None to get the path.
            tokens: what it will cost by estimate, for limits in tokens.

        Returns:
            The decoded answer, without a key of 12 characters or more should the server repeat it.

        Raises:
            BrokenAnswer: see ``answers``; not retried, as the request may have cost money.
            RejectedRequest: the server does not take this request.
            TemporaryFailure: no answer after all retries.
            UpstreamError: no request will ever be answered: wrong key, wrong model, no credit, a redirect.
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
            news = f"{self.host}: {failure}; all requests wait {pause:.0f} s"
            tqdm.write(make_printable(news), file=sys.stderr)
        return 0

    async def _send(self, path: str, body: dict[str, Any] | None, tokens: int) -> object:
        await self.pace.wait(tokens)
        try:
            async with asyncio.timeout(self.address.timeout):
                response, content = await self._exchange(path, body)
        except TimeoutError:
            raise TemporaryFailure(f"no answer within {self.address.timeout:g} s", is_slow=True) from None
        except httpx.TransportError as error:
            raise TemporaryFailure(f"the connection failed ({error or type(error).__name__})") from None
        if not response.is_success:
            raise self._judge(response, content)
        answer = parse_answer(content)
        return self._hide_in_answer(answer) if len(self._key) >= _SHORTEST_SECRET else answer

    async def _exchange(self, path: str, body: dict[str, Any] | None) -> tuple[httpx.Response, bytes]:
        url = self.address.base_url.rstrip("/") + path
        if body is None:
            request = self._client.build_request("GET", url)
        else:
            sent = json.dumps(body).encode()
            request = self._client.build_request(
                "POST", url, content=sent, headers={"Content-Type": "application/json"}
            )
        response = await self._client.send(request, stream=True)
        try:
            return response, await read_content(response)
        except BrokenAnswer:
            if response.is_success:
                raise
            return response, b""  # its status says enough
        finally:
            await response.aclose()

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

    def _judge(self, response: httpx.Response, content: bytes) -> Exception:
        """Return what an HTTP error means: for now, for this request, or for all."""
        status, address = response.status_code, self.address
        message, code = _read_fault(content)
        # A gateway's error is a whole page of HTML.
        reason = " ".join(f"{status}: {self._hide_key(message)}".split())[:_LONGEST_REASON]
        if status < 400:
            place = self._hide_key(urljoin(str(response.request.url), response.headers.get("location", "")))
            return UpstreamError(
                f"{self.host} sends requests on to {place[:_LONGEST_REASON]} ({status}), where nothing goes "
                f"that was meant for base_url. If that is the right address, set it in {address.section}."
            )
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
        if code == "insufficient_quota":
            return UpstreamError(
                f"{self.host} has no credit left for this key ({reason}). Add credit, then run again."
            )
        if status not in (408, 409, 429) and status < 500:
            return RejectedRequest(reason)
        pause = read_retry_after(response.headers.get("retry-after"))
        if pause is not None and pause > LONGEST_PAUSE:
            return UpstreamError(
                f"{self.host} wants no request for {pause / 60:.0f} minutes ({reason}). Run again then."
            )
        return TemporaryFailure(reason, pause, is_overload=status == 429)


def _read_fault(content: bytes) -> tuple[str, str]:
    """Return message and code of an error in OpenAI's format; of any other body the text."""
    try:
        body = parse_answer(content)
    except BrokenAnswer:
        return content[: 2 * _LONGEST_REASON].decode("utf-8", "replace"), ""
    error = cast(dict[str, Any], body).get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error), ""
    fields = cast(dict[str, Any], error)
    return str(fields.get("message") or fields), str(fields.get("code") or "")

"""What a server sends: so many bytes at most, and JSON of which no number, text or depth surprises anybody later."""

import json
import re
from typing import Any, cast

import httpx


# A thousand tokens with twenty alternatives each are 2 MB.
MOST_ANSWER_BYTES = 8 << 20
_MOST_DIGITS = 20
_MOST_DEPTH = 64
# Halves of a character, which no UTF-8 file can hold.
_SURROGATE = re.compile("[\ud800-\udfff]")


class BrokenAnswer(Exception):
    """The answer is no JSON, or none that can be kept."""


async def read_content(response: httpx.Response) -> bytes:
    """Return the body of an answer as it was sent.

    Raises:
        BrokenAnswer: it is longer than ``MOST_ANSWER_BYTES``, or compressed though that was not asked for.
    """
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise BrokenAnswer(f"the answer is compressed ({encoding[:20]})")
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MOST_ANSWER_BYTES:
            raise BrokenAnswer(f"the answer has more than {MOST_ANSWER_BYTES} bytes")
    return bytes(content)


def parse_answer(content: bytes) -> object:
    """Return decoded JSON.

    Raises:
        BrokenAnswer: it is none, or see ``check_value``.
    """
    try:
        value = json.loads(content.decode("utf-8"), parse_int=_read_integer)
    except (ValueError, RecursionError) as error:
        start = " ".join(content[:120].decode("utf-8", "replace").split())
        raise BrokenAnswer(f"broken JSON: {error}: {start}") from None
    check_value(value)
    return value


def _read_integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def check_value(value: object) -> None:
    """Refuse decoded JSON that could not be written again, or is too deep to be walked through.

    Raises:
        BrokenAnswer: half a character, a number of many digits, or lists in lists without end.
    """
    pending = [(value, 0)]
    while pending:
        part, depth = pending.pop()
        if depth > _MOST_DEPTH:
            raise BrokenAnswer("the answer is nested too deeply")
        if isinstance(part, str) and _SURROGATE.search(part):
            raise BrokenAnswer("a text holds half a character")
        if isinstance(part, int) and abs(part) >= 10**_MOST_DIGITS:
            raise BrokenAnswer("a number has too many digits")
        if isinstance(part, list):
            pending += [(one, depth + 1) for one in cast(list[object], part)]
        if isinstance(part, dict):
            for name, one in cast(dict[str, Any], part).items():
                pending += [(name, depth + 1), (one, depth + 1)]

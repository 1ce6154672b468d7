"""What a client makes of a server's answers, and how long it goes on asking; see also the captions and the backend."""

import asyncio
import gzip
import time
from collections.abc import Callable
from typing import Any

import pytest

from chatreid_plugin.errors import UpstreamError
from chatreid_plugin.servers.answers import BrokenAnswer
from chatreid_plugin.servers.client import RejectedRequest, ServerAddress, ServerClient, TemporaryFailure
from chatreid_plugin.servers.key import read_headers


Ask = Callable[..., object]
OK: tuple[Any, ...] = (200, {"text": "well"})


@pytest.fixture
def asked() -> list[float]:
    """Return the moments at which the server was asked."""
    return []


@pytest.fixture
def ask(serve_answers: Callable[..., str], asked: list[float], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Return a function that sends one request to a server that replies with these in order, the last one for ever."""
    monkeypatch.setattr("chatreid_plugin.servers.client.FIRST_WAIT", 0.01)

    def ask(*replies: Any, key: str = "", retries: int = 2) -> object:
        def answer(path: str, headers: dict[str, str], body: Any) -> tuple[Any, ...]:
            asked.append(time.monotonic())
            reply = replies[min(len(asked), len(replies)) - 1]
            return reply() if callable(reply) else reply

        monkeypatch.setenv("CHATREID_TEST_KEY", key)
        address = ServerAddress(serve_answers(answer), "any", "CHATREID_TEST_KEY", 0.3, retries, "a test", "key")

        async def send() -> object:
            client = ServerClient(address)
            try:
                return await client.ask("/chat/completions", {})
            finally:
                await client.close()

        return asyncio.run(send())

    return ask


@pytest.mark.parametrize("key", ["token", "1", "none", "A", "logprobs"])
def test_word_for_a_key_changes_no_answer(ask: Ask, key: str) -> None:
    answer = {"token": "A", "logprobs": [{"token": "1", "logprob": -1.125}, None, True], "hat": "none"}
    assert ask((200, answer), key=key) == answer


def test_key_is_hidden_in_texts_of_an_answer_alone(ask: Ask) -> None:
    key = "123456789012"
    answer = {key: [f"I heard {key}", 123456789012, {"id": key}]}
    assert ask((200, answer), key=key) == {key: ["I heard [key]", 123456789012, {"id": "[key]"}]}


def test_any_key_is_hidden_in_an_error(ask: Ask) -> None:
    with pytest.raises(RejectedRequest, match=r"^400: no such thing as \[key\]$"):
        ask((400, {"error": {"message": "no such thing as 40"}}), key="40")


def hang() -> tuple[Any, ...]:
    time.sleep(0.6)
    return OK


BUSY = (429, {}, {"Retry-After": "0"})
BROKEN = (500, {"error": {"message": "out of memory"}})


def test_time_outs_and_refusals_are_retried_apart(ask: Ask, asked: list[float]) -> None:
    assert ask(hang, BUSY, hang, BROKEN, OK) == OK[1]
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("replies", "reason", "times"),
    [
        ([hang], "no answer within 0.3 s", 3),
        ([BUSY], "^429", 3),
        ([hang, BUSY, hang, hang], "no answer within 0.3 s", 4),
        ([hang, BUSY, BROKEN, BROKEN], "out of memory", 4),
    ],
)
def test_either_ends_after_its_retries(
    ask: Ask, asked: list[float], replies: list[Any], reason: str, times: int
) -> None:
    with pytest.raises(TemporaryFailure, match=reason):
        ask(*replies)
    assert len(asked) == times


@pytest.mark.parametrize("status", [429, 503])
def test_short_retry_after_does_not_shorten_the_waits(
    ask: Ask, asked: list[float], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatreid_plugin.servers.client.FIRST_WAIT", 0.1)
    ask(*[(status, {}, {"Retry-After": "0"})] * 3, OK, retries=3)
    waits = [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)]
    assert all(wait > doubled for wait, doubled in zip(waits, (0.1, 0.2, 0.4), strict=True)), waits


def test_longer_retry_after_is_kept(ask: Ask, asked: list[float]) -> None:
    ask((429, {}, {"Retry-After": "0.5"}), OK)
    assert asked[1] - asked[0] > 0.5


def test_answer_without_end_is_given_up_by_its_bytes(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatreid_plugin.servers.answers.MOST_ANSWER_BYTES", 100_000)
    assert ask((200, {"text": "a" * 90_000})) == {"text": "a" * 90_000}
    with pytest.raises(BrokenAnswer, match="more than 100000 bytes"):
        ask((200, b'"' + b"a" * 50_000_000, {}, True))  # cut off long before the announced end


def test_compressed_answer_is_not_unpacked(ask: Ask) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    with pytest.raises(BrokenAnswer, match="compressed .gzip"):
        ask((200, bomb, {"Content-Encoding": "gzip"}))


def test_long_error_keeps_its_status(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatreid_plugin.servers.answers.MOST_ANSWER_BYTES", 100_000)
    with pytest.raises(RejectedRequest, match="^400"):
        ask((400, b"x" * 50_000_000))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(ask: Ask, asked: list[float], status: int) -> None:
    with pytest.raises(UpstreamError, match=r"sends requests on to http://elsewhere\.invalid/x \(30"):
        ask((status, {}, {"Location": "http://elsewhere.invalid/x"}))
    assert len(asked) == 1


@pytest.mark.parametrize(
    "body", [b'"\\ud800"', b"9" * 30, b"9" * 5000, b"[" * 100_000, b"[" * 200 + b"]" * 200, b"\xff", b"", b"Infinity,"]
)
def test_odd_answers_are_broken_ones(ask: Ask, body: bytes) -> None:
    with pytest.raises(BrokenAnswer):
        ask((200, body))


def test_variables_of_openais_client_go_to_openai_alone(
    serve_answers: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Secret: s3cret\nnonsense")
    monkeypatch.setenv("CHATREID_TEST_KEY", "k")
    found: list[dict[str, str]] = []
    base_url = serve_answers(lambda path, headers, body: found.append(headers) or (200, {}))

    async def send() -> None:
        client = ServerClient(ServerAddress(base_url, "any", "CHATREID_TEST_KEY", 5, 0, "a test", "key"))
        await client.ask("/models", None)
        await client.close()

    asyncio.run(send())
    assert found[0]["authorization"] == "Bearer k"
    assert not {"openai-organization", "openai-project", "x-secret"} & found[0].keys()
    own = {"X-Secret": "s3cret", "OpenAI-Organization": "org-1", "OpenAI-Project": "proj-1"}
    for url in ("https://api.openai.com/v1", "https://eu.api.openai.com/v1"):
        assert read_headers(url) == own
    for url in ("http://api.openai.com/v1", "https://xapi.openai.com/v1", "https://api.openai.com.example/v1"):
        assert read_headers(url) == {}


def test_server_that_redirects_names_no_key(ask: Ask) -> None:
    key = "sk-0123456789ab"
    with pytest.raises(UpstreamError, match=r"/\[key\]"):
        ask((307, {}, {"Location": f"/{key}"}), key=key)

"""What a client makes of a server's answers, how long it goes on asking, at what pace, and with which key.

See also the tests of captions and of the http backend.
"""

import gzip
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from chatreid_plugin.errors import ConfigError, UpstreamError
from chatreid_plugin.openai_answers import BrokenAnswer
from chatreid_plugin.openai_client import (
    OpenAIClient,
    Pace,
    RejectedRequest,
    Server,
    TemporaryFailure,
    is_local,
    read_headers,
    read_key,
    read_retry_after,
)


Ask = Callable[..., object]
OK: tuple[Any, ...] = (200, {"text": "well"})


@pytest.fixture
def asked() -> list[float]:
    """Return the moments at which the server was asked."""
    return []


@pytest.fixture
def ask(serve_answers: Callable[..., str], asked: list[float], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Return a function that sends one request to a server that replies with these in order, the last one for ever."""
    monkeypatch.setattr("chatreid_plugin.openai_client.FIRST_WAIT", 0.01)

    def ask(*replies: Any, key: str = "", retries: int = 2) -> object:
        def answer(path: str, headers: dict[str, str], body: Any) -> tuple[Any, ...]:
            asked.append(time.monotonic())
            reply = replies[min(len(asked), len(replies)) - 1]
            return reply() if callable(reply) else reply

        monkeypatch.setenv("CHATREID_TEST_KEY", key)
        server = Server(serve_answers(answer), "CHATREID_TEST_KEY", "key", "a test", 0.3, retries)
        client = OpenAIClient(server, "any")
        try:
            return client.ask("/chat/completions", {}, lambda answer: answer, readings=1)
        finally:
            client.close()

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
    monkeypatch.setattr("chatreid_plugin.openai_client.FIRST_WAIT", 0.1)
    ask(*[(status, {}, {"Retry-After": "0"})] * 3, OK, retries=3)
    waits = [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)]
    assert all(wait > doubled for wait, doubled in zip(waits, (0.1, 0.2, 0.4), strict=True)), waits


def test_longer_retry_after_is_kept(ask: Ask, asked: list[float]) -> None:
    ask((429, {}, {"Retry-After": "0.5"}), OK)
    assert asked[1] - asked[0] > 0.5


def test_answer_without_end_is_given_up_by_its_bytes(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatreid_plugin.openai_client.MOST_ANSWER_BYTES", 100_000)
    assert ask((200, {"text": "a" * 90_000})) == {"text": "a" * 90_000}
    with pytest.raises(BrokenAnswer, match="more than 100000 bytes"):
        ask((200, b'"' + b"a" * 50_000_000, {}, True))  # cut off long before the announced end


def test_compressed_answer_is_not_unpacked(ask: Ask) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    with pytest.raises(BrokenAnswer, match="compressed .gzip"):
        ask((200, bomb, {"Content-Encoding": "gzip"}))


def test_long_error_keeps_its_status(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatreid_plugin.openai_client.MOST_ANSWER_BYTES", 100_000)
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

    client = OpenAIClient(Server(base_url, "CHATREID_TEST_KEY", "key", "a test", 5, 0), "any")
    client.ask("/models", None, lambda answer: answer)
    client.close()
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


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://10.0.0.7:8000/v1", False),
        ("https://api.openai.com/v1", False),
        ("https://localhost.example.com/v1", False),
    ],
)
def test_local_servers_are_known(url: str, expected: bool) -> None:
    assert is_local(url) is expected


def test_key_is_needed_for_another_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    assert read_key("NO_SUCH_VARIABLE", "http://127.0.0.1:8000/v1", "x") == ""
    with pytest.raises(ConfigError, match=r"NO_SUCH_VARIABLE \(a\.b\) is not set.*scores\.invalid"):
        read_key("NO_SUCH_VARIABLE", "https://scores.invalid/v1", "a.b")
    monkeypatch.setenv("NO_SUCH_VARIABLE", " sk-1\n")
    assert read_key("NO_SUCH_VARIABLE", "https://scores.invalid/v1", "a.b") == "sk-1"


def measure(pace: Pace, *tokens: int) -> float:
    """Return the seconds until requests of so many tokens each have passed, all asked for at once."""

    start = time.monotonic()
    with ThreadPoolExecutor() as pool:
        list(pool.map(pace.wait, tokens))
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
    pace, start = Pace(600, None), time.monotonic()

    def send(_: int) -> float:
        pace.wait(1)
        return time.monotonic() - start

    with ThreadPoolExecutor() as pool:
        waiting = pool.map(send, range(3))
        time.sleep(0.05)
        pace.pause(0.4)
        first, second, third = sorted(waiting)
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


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> OpenAIClient:
    return OpenAIClient(Server("http://127.0.0.1:9/v1", "NO_SUCH_VARIABLE", "key", "a test", 1, 0, concurrency=3), "")


def test_work_is_done_in_threads_as_many_as_allowed_and_yielded_as_it_is_done(client: OpenAIClient) -> None:
    active, most, last = [0], [0], threading.Event()
    lock = threading.Lock()

    def work(number: int) -> int:
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
        if number == 0:
            last.wait(5)
        time.sleep(0.01)
        if number == 9:
            last.set()
        with lock:
            active[0] -= 1
        return number**2

    found = [(number, result.result()) for number, result in client.map(work, range(10))]
    assert sorted(found) == [(number, number**2) for number in range(10)]
    assert found[-1][0] in (0, 9) and most[0] == 3  # the first one waits for the last one


def test_callers_from_several_threads_share_the_limit(client: OpenAIClient) -> None:
    active, most, lock = [0], [0], threading.Lock()

    def work(number: int) -> None:
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
        time.sleep(0.02)
        with lock:
            active[0] -= 1

    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda _: sum(1 for _ in client.map(work, range(6))), range(3))
        assert list(done) == [6] * 3
    assert most[0] == 3


def test_errors_reach_the_caller_and_nothing_begins_that_is_not_asked_for(client: OpenAIClient) -> None:
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        raise ValueError(f"told so {number}")

    for _, result in client.map(work, range(100)):
        with pytest.raises(ValueError, match="told so"):
            result.result()
        break
    time.sleep(0.05)
    assert len(begun) == 3


def test_closed_client_sends_nothing(ask: Ask, asked: list[float], client: OpenAIClient) -> None:
    client.close()
    with pytest.raises(TemporaryFailure, match="closed"):
        client.ask("/models", None, lambda answer: answer)


def test_server_that_sends_byte_after_byte_is_slow(
    serve_answers: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        with suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.05)

    threading.Thread(target=drip, daemon=True).start()
    base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    slow = OpenAIClient(Server(base_url, "NO_SUCH_VARIABLE", "key", "a test", 0.3, 0), "any")
    start = time.monotonic()
    with pytest.raises(TemporaryFailure, match="no answer within 0.3 s"):
        slow.ask("/models", None, lambda answer: answer)
    assert time.monotonic() - start < 1
    listener.close()

"""Who may ask ``chatreid serve``: the key, and what it says of a server that everybody reaches."""

from collections.abc import Callable
from typing import Any

import pytest

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.openai_client import is_local
from chatreid_plugin.serve.server import format_address, run_server


@pytest.mark.slow
def test_key_is_asked_for_when_one_is_set(server: Any, start: Callable[..., Any]) -> None:
    locked = start(server.model, "sk-right")
    assert locked.ask("/v1/models")[0] == 401
    assert locked.ask("/v1/score", {})[0] == 401
    assert locked.ask("/v1/models", Authorization="Bearer sk-wrong")[0] == 401
    assert locked.ask("/v1/models", Authorization="Bearer sk-right")[0] == 200
    assert locked.ask("/health")[0] == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0"])
@pytest.mark.parametrize("value", [None, "", " \n"])
def test_named_variable_without_a_key_is_refused(
    host: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHATREID_TEST_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("CHATREID_TEST_KEY", value)
    with pytest.raises(ConfigError, match=r"'CHATREID_TEST_KEY' \(--api-key-variable\) is not set or empty"):
        run_server("no_such_checkpoint", [], host, 0, 3, None, "CHATREID_TEST_KEY")


def test_variable_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not set or empty"):
        run_server("no_such_checkpoint", [], "127.0.0.1", 0, 3, None, "")


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)]
)
def test_address_is_known_as_local(host: str, expected: bool) -> None:
    assert is_local(format_address(host, 8000)) is expected

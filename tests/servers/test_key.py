"""Where a key comes from; see also the tests of captions and of the http backend."""

import pytest

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.servers.key import is_local, read_key


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

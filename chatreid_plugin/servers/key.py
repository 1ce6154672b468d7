"""The key of a server and what goes with it: read from the environment, never written anywhere."""

import ipaddress
import os
from urllib.parse import urlsplit

from ..errors import ConfigError


OPENAI_HOST = "api.openai.com"


def is_local(base_url: str) -> bool:
    """Return whether a server is on this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(variable: str, base_url: str, setting: str) -> str:
    """Return the key from the environment; empty for a server on this machine that needs none.

    Args:
        variable: the environment variable's name.
        base_url: the server's.
        setting: where the variable is named, for the message, e.g. ``captioning.api_key_variable``.

    Raises:
        ConfigError: the variable is not set, or holds what no key can hold (the message does not show it).
    """
    key = os.environ.get(variable, "").strip()
    if not key and not is_local(base_url):
        raise ConfigError(
            f"The environment variable {variable} ({setting}) is not set. Put the key of {urlsplit(base_url).netloc} "
            "in it, or any word if that server needs none."
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"The environment variable {variable} holds characters that no key has.")
    return key


def read_headers(base_url: str) -> dict[str, str]:
    """Return the headers that OpenAI's own client takes from the environment, for OpenAI's own hosts alone.

    They are ``OPENAI_ORG_ID``, ``OPENAI_PROJECT_ID``, and ``OPENAI_CUSTOM_HEADERS`` with a ``Name: value`` a line.

    Raises:
        ConfigError: a variable holds what no header can hold (the message does not show it).
    """
    address = urlsplit(base_url)
    if address.scheme != "https" or not f".{address.hostname}".endswith(f".{OPENAI_HOST}"):
        return {}
    lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()
    headers = {name.strip(): value.strip() for name, mark, value in (line.partition(":") for line in lines) if mark}
    for name, variable in (("OpenAI-Organization", "OPENAI_ORG_ID"), ("OpenAI-Project", "OPENAI_PROJECT_ID")):
        if value := os.environ.get(variable, "").strip():
            headers[name] = value
    if not all(part.isascii() and part.isprintable() for header in headers.items() for part in header):
        raise ConfigError("OPENAI_ORG_ID, OPENAI_PROJECT_ID or OPENAI_CUSTOM_HEADERS holds what no header can hold.")
    return headers

"""The key of a server: read from the environment, never written anywhere."""

import ipaddress
import os
from urllib.parse import urlsplit

from ..errors import ConfigError


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

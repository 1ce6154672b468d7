"""The key of an endpoint: read from the environment, never written anywhere."""

import ipaddress
import os
from urllib.parse import urlsplit

from ...config import CaptioningSettings
from ...errors import ConfigError


def is_local(base_url: str) -> bool:
    """Return whether a server is on this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(settings: CaptioningSettings) -> str:
    """Return the key from the environment; empty for a server on this machine that needs none.

    Raises:
        ConfigError: the variable is not set, or holds what no key can hold (the message does not show it).
    """
    key = os.environ.get(settings.api_key_variable, "").strip()
    if not key and not is_local(settings.base_url):
        raise ConfigError(
            f"The environment variable {settings.api_key_variable} (captioning.api_key_variable) is not set. Put the "
            f"key of {urlsplit(settings.base_url).netloc} in it, or any word if that server needs none."
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"The environment variable {settings.api_key_variable} holds characters that no key has.")
    return key

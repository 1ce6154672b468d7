"""The errors a user may see: each says what happened, where and what to do, and carries an exit code.

Exit codes of every command: 0 done, 1 unexpected, 2 configuration, 3 data, 4 model or server, 130 interrupted.
"""

import re


# Control characters but tab and line feed, marks that turn the direction of writing, and halves of characters, as
# which names come that are no UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def make_printable(text: str) -> str:
    """Return a text for a terminal: a file's name or a server's words may hold what moves the cursor or hides lines.

    The escapes are those of JSON, so that JSON stays JSON.
    """
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


class ChatReIDError(Exception):
    """Base of all errors meant for the user; the command line prints its message alone, without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        return make_printable(super().__str__())


class ConfigError(ChatReIDError):
    """A YAML key, a command-line value or a combination of settings is wrong."""

    exit_code = 2


class DataError(ChatReIDError):
    """A data set, image, shard or record is missing or invalid."""

    exit_code = 3


class UpstreamError(ChatReIDError):
    """A model checkpoint, LLaMA-Factory or a server does not behave as this version of the plugin needs."""

    exit_code = 4

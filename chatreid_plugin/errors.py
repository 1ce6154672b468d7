"""The errors a user may see: each says what happened, where and what to do, and carries an exit code.

Exit codes of every command: 0 done, 1 unexpected, 2 configuration, 3 data, 4 model or server, 130 interrupted.
"""

from .printing import make_printable


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

"""What goes to a terminal: names of files and models, and what servers say, were chosen by others."""

import logging
import re
import sys


# Control characters but tab and line feed, marks that turn the direction of writing, and halves of characters, as
# which names come that are no UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def make_printable(text: str) -> str:
    """Return a text without what moves the cursor, hides lines or cannot be written, in the escapes of JSON.

    JSON stays JSON.
    """
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def say(text: object, *, aside: bool = False) -> None:
    """Print a text, as all commands do; ``aside``: on standard error."""
    print(make_printable(str(text)), file=sys.stderr if aside else sys.stdout, flush=True)


class PrintableFormatter(logging.Formatter):
    """Formats log lines for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return make_printable(super().format(record))

"""What goes to a terminal: names of files and models, and what servers say, were chosen by others."""

import io
import logging
import re
import sys
from collections.abc import Sequence


# Control characters but tab and line feed, marks that turn the direction of writing, and halves of characters, as
# which names come that are no UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_WIDEST_TABLE = 10_000


def make_printable(text: str) -> str:
    """Return a text without what moves the cursor, hides lines or cannot be written, in the escapes of JSON.

    JSON stays JSON.
    """
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def say(text: object, *, aside: bool = False) -> None:
    """Print a text, as all commands do; ``aside``: on standard error."""
    print(make_printable(str(text)), file=sys.stderr if aside else sys.stdout, flush=True)


def render_table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Return a table as text, as wide as it has to be.

    Args:
        columns: the head.
        rows: the cells, as many in each row as there are columns.
        words: how many columns, from the first, hold words; the others hold numbers and are aligned to the right.
    """
    # Not above: every command imports this module, few print a table.
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Wider than any table, since what is cut off or wrapped cannot be searched; names are no markup.
    console = Console(file=io.StringIO(), width=_WIDEST_TABLE, color_system=None, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


class PrintableFormatter(logging.Formatter):
    """Formats log lines for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return make_printable(super().format(record))


def log_warnings() -> None:
    """Let this process, which a command runs in, show warnings of all libraries on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])

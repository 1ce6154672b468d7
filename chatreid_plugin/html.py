"""HTML pages that open from disk without a network; every text from outside is escaped."""

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

import jinja2


DOTS_PER_INCH = 110


def render_template(template: Path, **values: Any) -> str:
    """Return a page.

    Args:
        template: a Jinja2 file that lies beside the module which fills it.
        values: what it names; one that is missing is an error, not an empty place.
    """
    return _open_folder(template.parent).get_template(template.name).render(**values)


@cache
def _open_folder(folder: Path) -> jinja2.Environment:
    """Return what keeps the compiled templates of a folder."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def encode_png(figure: Any) -> bytes:
    """Return a matplotlib figure, whose layout is constrained, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    # No version of matplotlib in the file, so that the same numbers give the same bytes.
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def embed_png(content: bytes) -> str:
    """Return a PNG file's bytes as a data URL, for a page without files of its own."""
    return "data:image/png;base64," + base64.b64encode(content).decode()

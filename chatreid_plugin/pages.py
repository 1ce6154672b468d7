"""HTML pages that open from disk without a network; every text from outside is escaped."""

from pathlib import Path
from typing import Any

import jinja2


def render_template(template: Path, **values: Any) -> str:
    """Return a page.

    Args:
        template: a Jinja2 file that lies beside the module which fills it.
        values: what it names; one that is missing is an error, not an empty place.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)

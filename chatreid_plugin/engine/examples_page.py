"""The page of examples: one HTML file with its pictures inside, which opens from disk without a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..crops import encode_thumbnail
from ..shards import open_atomically
from ..tasks import IMAGE_MARK
from .examples import Example


def _view_example(example: Example) -> dict[str, Any]:
    images = [{"picture": encode_thumbnail(Path(image.file)), "facts": image} for image in example.images]
    queries = sum(image.right is None for image in example.images)
    return {
        "example": example,
        "query": images[:queries],
        "gallery": images[queries:],
        # One piece more than there are images: the mark between two pieces stands for an image.
        "prompt": example.prompt.split(IMAGE_MARK),
    }


def render_page(examples: Sequence[Example]) -> str:
    """Return the HTML of the page; every text from outside is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    views = [_view_example(example) for example in examples]
    return environment.get_template("examples.html.j2").render(views=views)


def write_page(path: Path, examples: Sequence[Example]) -> None:
    """Write the page, atomically."""
    page = render_page(examples)
    with open_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")

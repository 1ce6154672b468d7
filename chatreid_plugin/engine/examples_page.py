"""The page of examples: one HTML file with its pictures inside, which opens from disk without a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..crops import encode_thumbnail
from ..pages import render_template
from ..shards import write_text
from ..tasks import IMAGE_MARK
from .examples import Example


TEMPLATE = Path(__file__).with_name("examples.html.j2")


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
    views = [_view_example(example) for example in examples]
    return render_template(TEMPLATE, views=views)


def write_page(path: Path, examples: Sequence[Example]) -> None:
    """Write the page, atomically."""
    write_text(path, render_page(examples))

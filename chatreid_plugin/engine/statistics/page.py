"""What ``chatreid stats`` writes: ``stats.json``, a PNG for each topic, and ``stats.html`` with everything inside."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ... import __version__
from ...pages import embed_png, encode_png, render_template
from ...printing import say
from ...shards import open_atomically, write_text
from .report import Statistics, compute_statistics
from .sections import Section, build_sections


TEMPLATE = Path(__file__).with_name("page.html.j2")


def find_output(dataset_dir: Path) -> Path:
    """Return the folder for the statistics: beside the data sets', which training reads and users copy or share."""
    folder = dataset_dir.resolve()
    return folder.with_name(f"{folder.name}_stats")


def render_page(statistics: Statistics, sections: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """Return the HTML of the page; every text from outside is escaped.

    Args:
        statistics: the numbers.
        sections: the topics in their order.
        pictures: topic -> PNG file; topics without a figure have none.
    """
    return render_template(
        TEMPLATE,
        statistics=statistics,
        sections=sections,
        pictures={topic: embed_png(content) for topic, content in pictures.items()},
        version=__version__,
    )


def write_statistics(dataset_dir: Path, output: Path | None = None) -> Statistics:
    """Compute the statistics of a folder of built data sets, write them and return them.

    Args:
        dataset_dir: the ``output_dir`` of ``chatreid build``.
        output: folder for the files; ``find_output`` if None.

    Raises:
        DataError: the folder holds no built data set, or a damaged one.
    """
    statistics = compute_statistics(dataset_dir)
    output = output or find_output(dataset_dir)
    sections = list(build_sections(statistics))
    pictures = {section.topic: encode_png(section.figure) for section in sections if section.figure is not None}
    for topic, content in pictures.items():
        with open_atomically(output / f"{topic}.png") as temporary:
            temporary.write_bytes(content)
    write_text(output / "stats.json", statistics.to_json() + "\n")
    write_text(output / "stats.html", render_page(statistics, sections, pictures))
    # stdout belongs to the numbers.
    say(f"Written: {output / 'stats.html'}, stats.json and {len(pictures)} PNG figures", aside=True)
    return statistics

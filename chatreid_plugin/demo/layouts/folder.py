"""``chatreid synth``: one synthetic layout, written whole into a new folder or not at all."""

from pathlib import Path

from ...errors import ConfigError, DataError
from ...shards import open_folder_atomically
from . import LAYOUTS


def find_layout(name: str) -> str:
    """Return the layout's key: ``name:variant``, or ``name`` for the set's only or first variant.

    Raises:
        ConfigError: no such layout.
    """
    if name in LAYOUTS:
        return name
    variants = [key for key in LAYOUTS if key.startswith(f"{name}:")]
    if not variants:
        raise ConfigError(f"There is no synthetic layout {name!r}. Known: {', '.join(LAYOUTS)}.")
    return variants[0]


def write_layout(name: str, directory: Path, seed: int = 0) -> str:
    """Write a small synthetic data set in a published layout and return what to do with it.

    Args:
        name: of the data set, or ``name:variant``.
        directory: a folder that does not exist yet, or is empty.
        seed: names the people; the same seed gives the same files.

    Raises:
        ConfigError: no such layout.
        DataError: the folder is not empty or is a file, or the disk is full; nothing is left then.
    """
    key = find_layout(name)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise DataError(f"{directory} is not an empty folder. Name a new one: nothing is overwritten.")
    with open_folder_atomically(directory) as temporary:
        layout = LAYOUTS[key](temporary, seed)
    parser, _, variant = key.partition(":")
    option = f" --variant {variant}" if variant else ""
    return f"{len(layout.records)} labelled images. Next: chatreid inspect {parser} {directory}{option}"

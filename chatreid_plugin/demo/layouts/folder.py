"""``chatreid synth``: one synthetic layout, written whole into a new folder or not at all."""

import os
import shutil
from pathlib import Path

from ...errors import ConfigError, DataError
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
        DataError: the folder is not empty, or is a file.
    """
    key = find_layout(name)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise DataError(f"{directory} is not an empty folder. Name a new one: nothing is overwritten.")
    target = directory.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        layout = LAYOUTS[key](temporary, seed)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    parser, _, variant = key.partition(":")
    option = f" --variant {variant}" if variant else ""
    return f"{len(layout.records)} labelled images. Next: chatreid inspect {parser} {directory}{option}"

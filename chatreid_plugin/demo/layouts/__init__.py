"""The synthetic world in the published layouts (``chatreid synth``): small copies of their folders and files.

The modules are named as those of ``datasets/``. Each has a table ``LAYOUTS`` of functions, which is found by itself.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from ...errors import ConfigError, DataError
from ...shards import open_folder_atomically
from .renderer import Layout


LayoutWriter = Callable[[Path, int], Layout]


def find_layouts() -> dict[str, LayoutWriter]:
    """Return what the modules write: parser (and ``:variant``) -> function(root, seed) -> what has to be found."""
    found: dict[str, LayoutWriter] = {}
    for name in sorted(module.name for module in iter_modules(__path__)):
        found |= getattr(import_module(f"{__name__}.{name}"), "LAYOUTS", {})
    return found


LAYOUTS = find_layouts()


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

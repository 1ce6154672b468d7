"""The files that ``chatreid init`` copies: recipes, evaluation files and the data set table.

A wheel carries them below ``chatreid_plugin/resources``; in a checkout (an editable installation) they are the
repository's own folders, beside the package.
"""

import filecmp
import shutil
from pathlib import Path

from .errors import ConfigError, DataError
from .shards import open_folder_atomically


# What a user gets, as patterns below the root. dataset_info also holds built shards, which are nobody's to copy.
PATTERNS = ("examples/**/*", "eval/**/*", "dataset_info/README.md", "dataset_info/dataset_info.json")


def find_resource_root() -> Path:
    """Return the folder with ``examples``, ``eval`` and ``dataset_info``.

    Raises:
        DataError: the installation has neither the shipped files nor a repository around it.
    """
    package = Path(__file__).resolve().parent
    for root in (package / "resources", package.parent):
        if (root / "examples").is_dir() and (root / "eval").is_dir():
            return root
    raise DataError(
        f"The recipes are neither in {package / 'resources'} nor beside {package}: the installation is incomplete. "
        "Install chatreid-plugin again with pip."
    )


def list_resources(root: Path) -> list[Path]:
    """Return the files to copy, relative to ``root``, sorted."""
    found = {path for pattern in PATTERNS for path in root.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(root) for path in found)


def copy_resources(destination: Path, *, force: bool = False) -> list[Path]:
    """Copy the recipes into ``destination`` and return the files written; files already the same are left alone.

    Raises:
        ConfigError: a file there differs and ``force`` is not set; then nothing has been written.
        DataError: the disk is full or cannot be written; nothing has been written either.
    """
    root = find_resource_root()
    if destination.exists() and not destination.is_dir():
        raise ConfigError(f"{destination} is a file; give a folder to copy the recipes into.")
    files = [file for file in list_resources(root) if not _is_same(root / file, destination / file)]
    changed = [file for file in files if (destination / file).exists()]
    if changed and not force:
        names = ", ".join(str(file) for file in changed[:5]) + (", ..." if len(changed) > 5 else "")
        raise ConfigError(
            f"{destination} has {len(changed)} file(s) that differ from the shipped ones: {names}. "
            "Nothing was copied; use another folder, or --force to overwrite them."
        )
    with open_folder_atomically(destination, keep_others=True) as temporary:
        for file in files:
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, temporary / file)
    return [destination / file for file in files]


def _is_same(shipped: Path, present: Path) -> bool:
    return present.is_file() and filecmp.cmp(shipped, present, shallow=False)

"""The one walk through a raw data set's folders: links are followed, no folder is read twice, the rest is counted."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from .listing import Listing


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_LEFTOVERS = "__MACOSX"


def find_images(folder: Path, listing: Listing) -> Iterator[Path]:
    """Yield the image files below ``folder``; hidden files and leftovers of other systems are skipped.

    Links are followed, so that links to folders on another disk work; ``list_source`` says which images lie outside
    the listing's root. Linked folders come last, and no folder is read twice: an image has one name, its own if it has
    one in ``folder``, and links in a circle end. What is left out is counted in ``listing.skipped``.
    """
    seen: set[tuple[int, int]] = set()
    links: list[str] = []
    waiting = [str(folder)]
    while waiting or links:
        place = waiting.pop() if waiting else links.pop(0)
        below: list[str] = []
        for entry in _scan(place, seen, listing):
            if _is_folder(entry):
                if entry.name == _LEFTOVERS or entry.name.startswith("."):
                    continue
                if not entry.is_symlink():
                    below.append(entry.path)
                elif stays := _explain_stay(entry.path, folder, listing):
                    listing.skip(stays)
                else:
                    links.append(entry.path)
            elif reason := _explain_refusal(entry):
                listing.skip(reason)
            else:
                yield Path(entry.path)
        waiting += reversed(below)


def _scan(folder: str, seen: set[tuple[int, int]], listing: Listing) -> list[os.DirEntry[str]]:
    """Return a folder's entries in order; none, and a count, if it was seen before or cannot be read."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            listing.skip("link to a folder that is read under another name")
            return []
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:  # no permission, or a path longer than the system allows
        listing.skip(f"folder that cannot be read ({error.strerror})")
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _explain_stay(link: str, start: Path, listing: Listing) -> str:
    """Return why a linked folder is not read; empty if it is.

    Not one that holds the link, as whatever lies there is no part of the folder; and from the folder of one split into
    that of another, as its images would be in both.
    """
    target = os.path.realpath(link)
    if _is_below(os.path.realpath(os.path.dirname(link)), target):
        return "link to a folder above it"
    if _is_below(target, os.path.realpath(listing.root)) and not _is_below(target, os.path.realpath(start)):
        return "link to another part of the data set"
    return ""


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _explain_refusal(entry: os.DirEntry[str]) -> str:
    """Return why a file is not read; empty if it is an image."""
    if entry.name.startswith(".") or not entry.name.lower().endswith(IMAGE_SUFFIXES):
        return "not an image file"
    try:
        entry.name.encode()
        if entry.is_file():
            return ""
        return "pipe or device, not a file" if os.path.exists(entry.path) else "link to a missing file"
    except UnicodeEncodeError:
        return "name is not UTF-8"
    except OSError as error:
        return f"file that cannot be read ({error.strerror})"


def find_named(
    listing: Listing, folder: Path, expression: re.Pattern[str], example: str, parents: int = 0
) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield (path below the root, match) of each image below ``folder`` whose name has the published form.

    Peers search the whole path, where a parent folder such as ``2024_c1run`` is taken for a camera; here the
    expression has to match the whole file name, with ``parents`` folders before it. The others are counted.

    Args:
        listing: counts what is skipped; its root is cut off the paths.
        folder: where to look.
        expression: matched against ``name`` or, with ``parents``, ``folder/name``.
        example: a name of the published form, for messages.
        parents: how many folders before the name belong to the form.

    Raises:
        DataError: no image has the form.
    """
    count = 0
    other = ""
    for path in find_images(folder, listing):
        name = "/".join(path.parts[-1 - parents :])
        match = expression.fullmatch(name)
        if match is None:
            other = other or name
            listing.skip(f"name is not of the form {example}")
            continue
        count += 1
        yield path.relative_to(listing.root).as_posix(), match
    if count == 0:
        found = f"It has {other}: do not rename or convert the files" if other else "It holds no image: unpack it"
        raise DataError(f"{folder} holds no file named like {example}. {found}, or set `root` to the published one.")

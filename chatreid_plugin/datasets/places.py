"""Where a listing's images really lie: never above the root by name, and nowhere else through a link unsaid."""

import os
from collections import Counter

from ..errors import DataError
from ..regular_files import leaves_root
from .listing import Listing


_PLACES_SHOWN = 5


def check_places(listing: Listing) -> None:
    """Refuse paths that leave the listing's root by name, and warn of images that do so through links.

    The links are followed, as people keep folders on other disks; but a downloaded data set may hold a link to a
    folder of private pictures, so that the user has to see where it led.

    Raises:
        DataError: a label file names an image above the root, or by a path from the root of the system.
    """
    root = os.path.realpath(listing.root)
    known: dict[str, tuple[str, str] | None] = {}
    outside: Counter[tuple[str, str]] = Counter()
    for crop in listing.crops:
        if leaves_root(crop.path):
            raise DataError(
                f"{listing.root}: the labels name {crop.path!r}, which does not lie below that folder. Nothing "
                "elsewhere is read: get the label files from the data set's authors."
            )
        folder = crop.path.rpartition("/")[0]
        if folder not in known:
            known[folder] = _find_exit(root, folder)
        place = known[folder]
        if place is None and os.path.islink(os.path.join(root, crop.path)):
            target = os.path.realpath(os.path.join(root, crop.path))
            place = None if _is_below(target, root) else (folder or ".", os.path.dirname(target))
        if place is not None:
            outside[place] += 1
    if outside:
        listing.warnings.append(_describe(outside))


def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root


def _find_exit(root: str, folder: str) -> tuple[str, str] | None:
    """Return the first folder on the way down that leads out of the root, and where to."""
    parts = folder.split("/")
    for count in range(1, len(parts) + 1):
        name = "/".join(parts[:count])
        target = os.path.realpath(os.path.join(root, name))
        if not _is_below(target, root):
            return name, target
    return None


def _describe(outside: Counter[tuple[str, str]]) -> str:
    shown = [f"{count} of {name} in {target}" for (name, target), count in outside.most_common(_PLACES_SHOWN)]
    more = f"; {len(outside) - _PLACES_SHOWN} more links" if len(outside) > _PLACES_SHOWN else ""
    return f"{outside.total()} images lie outside the folder, through links: {'; '.join(shown)}{more}"

"""What a parser returns: the crops of a raw data set as its labels describe them, no image opened yet.

And what every parser does with the files: folders are found and walked once, links are followed but said, what is left
out is counted with its reason, and what labels name has to be there, below the data set's folder.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import SourceSettings
from ..errors import DataError
from ..records import Modality, Split
from ..regular_files import leaves_root


# The number that data sets give to what is nobody: cut-off people, background, wrong detections.
JUNK = "-1"
JUNK_REASON = "junk (identity -1)"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_LEFTOVERS = "__MACOSX"
_PLACES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Crop:
    """One image file with its labels.

    Attributes:
        path: relative to the listing's root, with forward slashes.
        split: ``train``, ``val``, ``query`` or ``gallery``.
        person: identity as published, unique within the data set (published numbers that start again in the test
            set get a prefix).
        camera: as published.
        clothes: outfit label, unique within the person, where the data set has one.
        modality: ``visible`` or ``infrared``.
        captions: sentences that describe the person; see ``keep_captions``.
        attributes: attribute name to value.
    """

    path: str
    split: Split
    person: str
    camera: str
    clothes: str | None = None
    modality: Modality = "visible"
    captions: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(slots=True)
class Listing:
    """The crops of a data set and what was left out, with reasons.

    Attributes:
        root: the folder that the crops' paths are relative to.
        crops: one for each image that is used.
        skipped: reason -> number of files left out.
        warnings: things that are allowed but unusual.
        protocol: what an evaluation needs beyond the records (published trials, identities that change clothes);
            JSON values, kept in the manifest's provenance.
    """

    root: Path
    crops: list[Crop] = field(default_factory=list[Crop])
    skipped: dict[str, int] = field(default_factory=dict[str, int])
    warnings: list[str] = field(default_factory=list[str])
    protocol: dict[str, Any] = field(default_factory=dict[str, Any])

    def skip(self, reason: str, count: int = 1) -> None:
        """Count files that are left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count


@dataclass(frozen=True, slots=True)
class DataSet:
    """How a data set lies on disk: an entry of a module's ``DATASETS``, under its parser's name.

    Attributes:
        list_images: the parser; it reads labels and names and opens no image.
        keys: the keys of a source that belong to some parsers only, this one among them: ``labels``, ``pattern``, ...
    """

    list_images: Callable[[SourceSettings], Listing]
    keys: tuple[str, ...] = ()


def find_root(root: Path, folders: Sequence[str], title: str, inner: Sequence[str] = ()) -> Path:
    """Return the folder that holds all ``folders`` (or files): ``root`` or one of its ``inner`` folders.

    Raises:
        DataError: ``root`` is missing, or nowhere are they all; names what ``root`` lacks.
    """
    candidates = [root, *(root / name for name in inner)]
    missing = [[folder for folder in folders if not (place / folder).exists()] for place in candidates]
    if [] in missing:
        return candidates[missing.index([])]
    check_folder(root)
    place, lacks = min(zip(candidates, missing, strict=True), key=lambda pair: len(pair[1]))
    near = next((path for path in _list_near(root) if all((path / folder).exists() for folder in folders)), None)
    advice = (
        f"Set `root` to {near}."
        if near
        else "Copy what is missing, or set `root` to the folder that holds all (`chatreid list NAME` shows it)."
    )
    raise DataError(f"{place} lacks {', '.join(lacks)} of {title}. {advice}")


def check_folder(root: Path) -> None:
    """Refuse a data set folder that is not there.

    Raises:
        DataError: it does not exist, or is a file.
    """
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is not a folder. Unpack it if it is an archive, and set `root` to what comes out.")
    if not root.is_dir():
        raise DataError(f"Data set folder {root} does not exist. Set `root` to where you unpacked the data set.")


def _list_near(root: Path) -> list[Path]:
    """Return the folders that people mean when they name ``root``: the two above it, and those in it."""
    whole = root.absolute()
    try:
        return [*list(whole.parents)[:2], *sorted(path for path in root.iterdir() if path.is_dir())]
    except OSError:
        return list(whole.parents)[:2]


def keep_captions(listing: Listing, texts: Sequence[str], split: Split) -> tuple[str, ...]:
    """Return an image's captions, stripped; empty ones are counted and dropped.

    Of a tested image an empty caption keeps its place, as an empty text: scores from elsewhere name a caption by its
    number in the file (``<path>#<number>``), which would shift.
    """
    stripped = tuple(text.strip() for text in texts)
    empty = stripped.count("")
    if empty:
        listing.skip("empty caption", empty)
    return stripped if split in ("query", "gallery") else tuple(text for text in stripped if text)


def find_shared_people(crops: Sequence[Crop]) -> list[str]:
    """Return a warning if people are trained and tested: of the benchmarks, none may be."""
    trained = {crop.person for crop in crops if crop.split == "train"}
    shared = sorted(trained & {crop.person for crop in crops if crop.split in ("query", "gallery")})
    if not shared:
        return []
    first = ", ".join(shared[:5]) + (", ..." if len(shared) > 5 else "")
    return [
        f"identities that are both in train and in query or gallery: {len(shared):,} ({first}). If they are other "
        "people whose numbers start again, give the tested ones names of their own"
    ]


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


def check_files(listing: Listing) -> None:
    """Refuse a listing whose label files name images that are not there.

    Raises:
        DataError: names how many are missing in each folder, and the first.
    """
    missing = [crop.path for crop in listing.crops if not (listing.root / crop.path).is_file()]
    if not missing:
        return
    folders = Counter(path.rpartition("/")[0] or "." for path in missing)
    raise DataError(
        f"{len(missing)} of {len(listing.crops)} images that the labels name are missing below {listing.root}: "
        + ", ".join(f"{count} in {folder}" for folder, count in folders.most_common(5))
        + f" (first: {missing[0]}). {_advise_on_missing(listing.root / missing[0])}"
    )


def _advise_on_missing(path: Path) -> str:
    """Return what to do about a missing image: it may be there under another ending, or its folder be empty."""
    try:
        present = sorted(name for name in os.listdir(path.parent) if not name.startswith("."))
    except (OSError, ValueError):
        present = []
    same = next((name for name in present if Path(name).stem.lower() == path.stem.lower()), None)
    if same:
        return f"{same} is there instead: give the images the names that the labels have."
    if present:
        return f"The folder has {len(present)} other files. Copy the missing ones, or get labels that fit the images."
    return "Unpack that part of the data set."


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

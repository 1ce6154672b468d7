"""What a parser returns: the crops of a raw data set as its labels describe them, no image opened yet."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..records import Modality, Split
from ..shards import read_text


# The number that data sets give to what is nobody: cut-off people, background, wrong detections.
JUNK = "-1"
JUNK_REASON = "junk (identity -1)"


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


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, stripped text) of a list file, blank lines skipped.

    Raises:
        DataError: the file is missing or is not text.
    """
    if not path.exists():
        raise DataError(f"List file {path} is missing. Get it from the data set's authors.")
    lines = read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.strip()


def check_files(listing: Listing, paths: Sequence[str]) -> None:
    """Refuse a listing whose label files name images that are not there.

    Raises:
        DataError: names how many are missing in each folder, and the first.
    """
    missing = [path for path in paths if not (listing.root / path).is_file()]
    if not missing:
        return
    folders: dict[str, int] = {}
    for path in missing:
        folder = path.rpartition("/")[0] or "."
        folders[folder] = folders.get(folder, 0) + 1
    most = sorted(folders.items(), key=lambda item: -item[1])[:5]
    raise DataError(
        f"{len(missing)} of {len(paths)} images that the labels name are missing below {listing.root}: "
        + ", ".join(f"{count} in {folder}" for folder, count in most)
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

"""What a parser returns: the crops of a raw data set as its labels describe them, no image opened yet."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..records import Modality, Split


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


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
        captions: sentences that describe the person.
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
    for candidate in (root, *(root / name for name in inner)):
        if all((candidate / folder).exists() for folder in folders):
            return candidate
    if not root.is_dir():
        raise DataError(f"Data set folder {root} does not exist.")
    missing = [folder for folder in folders if not (root / folder).exists()]
    raise DataError(
        f"{root} lacks {', '.join(missing)} of {title}. Set `root` to the folder that holds them "
        "(`chatreid list NAME` shows the layout)."
    )


def find_images(folder: Path, listing: Listing) -> Iterator[Path]:
    """Yield image files below ``folder`` in sorted order; hidden files and leftovers of other systems are skipped."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__MACOSX" and not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or not name.lower().endswith(IMAGE_SUFFIXES):
                listing.skip("not an image file")
            else:
                yield Path(parent) / name


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
    for path in find_images(folder, listing):
        match = expression.fullmatch("/".join(path.parts[-1 - parents :]))
        if match is None:
            listing.skip(f"name is not of the form {example}")
            continue
        count += 1
        yield path.relative_to(listing.root).as_posix(), match
    if count == 0:
        raise DataError(f"{folder} holds no file named like {example}.")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, stripped text) of a list file, blank lines skipped.

    Raises:
        DataError: the file is missing or is not text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"List file {path} is missing. Get it from the data set's authors.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"List file {path} cannot be read: {error}.") from None
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
        + f" (first: {missing[0]}). Unpack the missing parts of the data set."
    )

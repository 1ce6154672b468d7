"""SYSU-MM01 (shared notes on protocols, section 1.6): six camera folders, identity lists, published test trials."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from ..config import SourceSettings
from ..errors import DataError
from ..records import Split
from .listing import Crop, Listing, find_root, read_lines
from .matlab_files import read_matlab
from .walking import find_named


SYSU_NAME = re.compile(r"cam(?P<camera>[1-6])/(?P<person>\d{4})/\d{4}\.jpg", re.IGNORECASE | re.ASCII)
SYSU_EXAMPLE = "cam1/0001/0001.jpg"
SYSU_CAMERAS = ("1", "2", "3", "4", "5", "6")
INFRARED_CAMERAS = ("3", "6")
PERMUTATION_FILE = "rand_perm_cam.mat"
PERMUTATION_SOURCE = "github.com/wuancong/SYSU-MM01, folder evaluation/data_split"
# Single-shot takes the first image of a trial's permutation, multi-shot the first ten.
MULTI_SHOT = 10
TRIALS = 10


def list_sysumm01(source: SourceSettings) -> Listing:
    """List ``cam1`` to ``cam6``: infrared test images are the queries, visible ones the gallery.

    ``train_id`` and ``val_id`` both train, as in every peer. ``protocol["trials"]`` holds, for each published trial,
    ``{"paths": groups}``: for each test identity and visible camera the first ten images of the trial's permutation,
    in order, so that single-shot is the first of each group and multi-shot the whole group. Without
    ``rand_perm_cam.mat`` (in the root, in ``exp`` or beside the root) there are no trials, and a warning.

    Raises:
        DataError: a folder or list is missing or wrong, or the permutations do not fit the images.
    """
    folders = [f"cam{camera}" for camera in SYSU_CAMERAS]
    listing = Listing(find_root(source.root, [*folders, "exp"], "SYSU-MM01", ["SYSU-MM01"]))
    lists = listing.root / "exp"
    test = _find_identities(lists, "test_id")
    training = _find_identities(lists, "train_id") | _find_identities(lists, "val_id")
    if test & training:
        raise DataError(
            f"{lists}: identity {min(test & training)} is both in test_id and in train_id or val_id. "
            "Copy the lists of the published archive again."
        )
    for folder in folders:
        for path, match in find_named(listing, listing.root / folder, SYSU_NAME, SYSU_EXAMPLE, parents=2):
            number, infrared = int(match["person"]), match["camera"] in INFRARED_CAMERAS
            if number not in test | training:
                listing.skip("identity in no split list")
                continue
            split: Split = "train" if number in training else "query" if infrared else "gallery"
            modality = "infrared" if infrared else "visible"
            listing.crops.append(Crop(path, split, match["person"], match["camera"], modality=modality))
    _add_trials(listing)
    return listing


def _find_identities(folder: Path, name: str) -> set[int]:
    """Return the identities of ``name.txt``, or of ``name.mat`` where the text is missing."""
    path, matlab = folder / f"{name}.txt", folder / f"{name}.mat"
    if not path.is_file() and matlab.is_file():
        return {int(number) for number in _load_variable(matlab).ravel()}
    return read_identities(path)


def read_identities(path: Path) -> set[int]:
    """Return the identities of a list file: numbers, comma separated.

    Raises:
        DataError: the file is missing, or holds something else.
    """
    found: set[int] = set()
    for number, line in read_lines(path):
        for text in filter(None, (text.strip() for text in line.split(","))):
            if not text.isdecimal():
                raise DataError(f"{path}, line {number}: {text!r} is no identity; expected numbers and commas.")
            found.add(int(text))
    return found


def _load_variable(path: Path) -> np.ndarray[Any, Any]:
    """Return the one variable of a MATLAB file."""
    content = read_matlab(path)
    names = [name for name in content if not name.startswith("__")]
    if len(names) != 1:
        raise DataError(f"{path} must hold one variable, found {', '.join(names) or 'none'}. Copy it again.")
    return content[names[0]]


def _add_trials(listing: Listing) -> None:
    root = listing.root
    found = [folder / PERMUTATION_FILE for folder in (root, root / "exp", root.parent)]
    path = next((candidate for candidate in found if candidate.is_file()), None)
    if path is None:
        listing.warnings.append(
            f"no {PERMUTATION_FILE} in {root}, its exp folder or beside it: it is not in the archive but published at "
            f"{PERMUTATION_SOURCE}; without it, evaluation falls back to seeded draws of the gallery"
        )
        return
    images: dict[tuple[str, str], list[str]] = {}
    for crop in listing.crops:
        if crop.split == "gallery":
            images.setdefault((crop.person, crop.camera), []).append(crop.path)
    cells = _load_variable(path)
    groups = [_draw_group(path, cells, key, sorted(images[key])) for key in sorted(images)]
    listing.protocol["trials"] = [{"paths": list(trial)} for trial in zip(*groups, strict=True)]


def _draw_group(path: Path, cells: np.ndarray[Any, Any], key: tuple[str, str], images: list[str]) -> list[list[str]]:
    """Return, for each trial, the first ten images of one identity and camera.

    The cell of a camera holds a cell for each identity: trials x images, numbers from 1 into the sorted files.
    """
    person, camera = key
    try:
        rows = np.asarray(cells.ravel()[int(camera) - 1].ravel()[int(person) - 1]).astype(int)
        numbers = list(range(1, len(images) + 1))
        fits = len(rows) == TRIALS and all(sorted(row) == numbers for row in rows.tolist())
    except (IndexError, AttributeError, TypeError, ValueError):
        raise DataError(
            f"{path} has no permutations of identity {person}, camera {camera}. "
            f"Get the file of {PERMUTATION_SOURCE}, or move it away to evaluate with seeded draws."
        ) from None
    if not fits:
        raise DataError(
            f"{path} has {len(rows)} permutations of {rows.shape[-1]} images of identity {person}, camera {camera}; "
            f"expected {TRIALS} of the {len(images)} images that are there. Get the missing files, or move "
            f"{PERMUTATION_FILE} away to evaluate with seeded draws."
        )
    return [[images[number - 1] for number in row[:MULTI_SHOT]] for row in rows.tolist()]

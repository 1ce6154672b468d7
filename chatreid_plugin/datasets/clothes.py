"""LTCC and PRCC, where people change clothes (shared notes on protocols, sections 1.4 and 1.5)."""

import re
from pathlib import Path

from ..config import SourceSettings
from ..errors import DataError
from ..records import Split
from .listing import Crop, Listing, find_root, read_lines
from .walking import find_named


LTCC_NAME = re.compile(r"(?P<person>\d{3})_(?P<clothes>\d+)_c(?P<camera>\d{1,2})_\d+\.png", re.IGNORECASE | re.ASCII)
LTCC_EXAMPLE = "094_1_c9_015833.png"
LTCC_FOLDERS: dict[str, Split] = {"train": "train", "query": "query", "test": "gallery"}
# Key of the protocol -> list file: who changes clothes; two more files list the others.
LTCC_LISTS = {
    "cloth_change_train_people": "cloth-change_id_train.txt",
    "cloth_change_test_people": "cloth-change_id_test.txt",
}

PRCC_TRAIN_NAME = re.compile(r"(?P<person>\d+)/(?P<camera>[ABC])_[^/]+\.(?:jpg|png)", re.IGNORECASE | re.ASCII)
PRCC_TRAIN_EXAMPLE = "001/A_cropped_rgb370.jpg"
PRCC_TEST_NAME = re.compile(r"(?P<camera>[ABC])/(?P<person>\d+)/[^/]+\.(?:jpg|png)", re.IGNORECASE | re.ASCII)
PRCC_TEST_EXAMPLE = "A/003/cropped_rgb001.jpg"
PRCC_TRAIN_FOLDERS: dict[str, Split] = {"train": "train", "val": "val"}
PRCC_TEST_FOLDERS: dict[str, Split] = {"A": "gallery", "B": "query", "C": "query"}
# People wear the same in front of cameras A and B and something else in front of C.
PRCC_OUTFITS = {"A": "1", "B": "1", "C": "2"}


def list_ltcc(source: SourceSettings) -> Listing:
    """List ``train``, ``query`` and ``test`` (the gallery).

    An outfit's number means something only together with its person's, so outfits are called ``<person>_<number>``.
    ``protocol`` names the people that change clothes, as the lists of ``info`` do: some evaluations leave out the
    others.

    Raises:
        DataError: a folder or list file is missing, a folder holds no image of the published name form, or a line
            of a list is no number of a person.
    """
    listing = Listing(find_root(source.root, [*LTCC_FOLDERS, "info"], "LTCC", ["LTCC_ReID"]))
    for folder, split in LTCC_FOLDERS.items():
        for path, match in find_named(listing, listing.root / folder, LTCC_NAME, LTCC_EXAMPLE):
            person = match["person"]
            listing.crops.append(Crop(path, split, person, match["camera"], f"{person}_{match['clothes']}"))
    people = {crop.person for crop in listing.crops}
    for key, name in LTCC_LISTS.items():
        listed = _read_people(listing.root / "info" / name)
        listing.protocol[key] = listed
        missing = [person for person in listed if person not in people]
        if missing:
            listing.warnings.append(f"info/{name} names {len(missing)} people without an image (first: {missing[0]})")
    return listing


def _read_people(path: Path) -> list[str]:
    people: list[str] = []
    for number, line in read_lines(path):
        if not re.fullmatch(r"\d{1,3}", line, re.ASCII):
            raise DataError(f"{path}, line {number}: {line!r} is not the number of a person. Copy the list again.")
        people.append(f"{int(line):03d}")
    return people


def list_prcc(source: SourceSettings) -> Listing:
    """List the photographs below ``rgb``; contour sketches (``sketch``) are not used.

    In ``train`` and ``val`` the camera is the first letter of the name, in ``test`` the folder. ``test/A`` is the
    gallery; ``test/B`` (same clothes) and ``test/C`` (other clothes) are queries.

    Raises:
        DataError: a folder is missing or holds no image of the published form.
    """
    folders = [
        f"rgb/{folder}" for folder in (*PRCC_TRAIN_FOLDERS, *(f"test/{camera}" for camera in PRCC_TEST_FOLDERS))
    ]
    listing = Listing(find_root(source.root, folders, "PRCC", ["prcc", "PRCC"]))
    rgb = listing.root / "rgb"
    for folder, split in PRCC_TRAIN_FOLDERS.items():
        for path, match in find_named(listing, rgb / folder, PRCC_TRAIN_NAME, PRCC_TRAIN_EXAMPLE, parents=1):
            camera = match["camera"].upper()
            listing.crops.append(Crop(path, split, match["person"], camera, PRCC_OUTFITS[camera]))
    for camera, split in PRCC_TEST_FOLDERS.items():
        for path, match in find_named(listing, rgb / "test" / camera, PRCC_TEST_NAME, PRCC_TEST_EXAMPLE, parents=2):
            listing.crops.append(Crop(path, split, match["person"], camera, PRCC_OUTFITS[camera]))
    return listing

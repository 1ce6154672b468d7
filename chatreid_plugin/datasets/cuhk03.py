"""CUHK03: the raw ``cuhk-03.mat`` with the new or the classic protocol, and the pre-split CUHK03-NP folders.

Rules and counts: shared notes on protocols, section 1.3.
"""

import re
from pathlib import Path

from ..config import SourceSettings
from ..errors import DataError
from .catalog import get_variant
from .cuhk03_files import extract_images, read_new_protocol, read_test_people
from .listing import Crop, Listing, check_folder, find_root
from .market import MARKET_FOLDERS
from .walking import find_named


PNG_NAME = re.compile(r"(?P<person>[1-5]_\d{3})_(?P<view>[12])_\d{2}\.png", re.IGNORECASE | re.ASCII)
PNG_EXAMPLE = "1_001_1_01.png"
NP_NAME = re.compile(r"(?P<person>\d{4})_c(?P<camera>[12])_\d+\.(?:png|jpg)", re.IGNORECASE | re.ASCII)
NP_EXAMPLE = "0003_c1_21.png"
RAW_FILE = "cuhk-03.mat"
_CONFIGURATION_SOURCE = "github.com/zhunzhong07/person-re-ranking, evaluation/data/CUHK03"


def list_cuhk03(source: SourceSettings) -> Listing:
    """List CUHK03 in one of its forms.

    ``detected`` and ``labeled`` are the new protocol (767 train and 700 test people), ``detected_classic`` and
    ``labeled_classic`` one of the 20 classic splits (``source.trial``: 100 test people, all others train; every test
    image is query and gallery, so it has split gallery and ``protocol`` says ``query_is_gallery``). They need
    ``cuhk-03.mat``, whose images are written once as PNG into ``images_detected`` or ``images_labeled`` beside it.
    ``detected_np`` and ``labeled_np`` are the pre-split folders of the new protocol.

    A person is called ``<pair>_<number>``, such as ``1_001``, in the NP folders ``0001``; the camera is the view.

    Raises:
        ConfigError: an unknown variant or trial.
        DataError: a file or folder is missing or damaged.
    """
    boxes, _, protocol = get_variant(source).partition("_")
    if protocol == "np":
        return _list_folders(source.root, boxes)
    check_folder(source.root)
    listing = Listing(source.root)
    if protocol == "classic":
        _list_classic(listing, boxes, source.trial)
    else:
        _list_new(listing, boxes)
    return listing


def _list_folders(root: Path, boxes: str) -> Listing:
    # The folder `detected` or `labeled` has to be there by name: inside, the two forms look alike.
    folders = [f"{boxes}/{folder}" for folder in MARKET_FOLDERS]
    listing = Listing(find_root(root, folders, f"CUHK03-NP ({boxes})", ["cuhk03-np", "CUHK03-NP"]))
    for folder, split in MARKET_FOLDERS.items():
        for path, match in find_named(listing, listing.root / boxes / folder, NP_NAME, NP_EXAMPLE):
            listing.crops.append(Crop(path, split, match["person"], match["camera"]))
    return listing


def _find_file(root: Path, name: str, advice: str) -> Path:
    for folder in (root, root / "cuhk03_release"):
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{root} holds no {name}, nor does its folder cuhk03_release. {advice}")


def _find_raw_file(root: Path, boxes: str) -> Path:
    advice = f"Ask the data set's authors for it; if you have CUHK03-NP's folders, set `variant: {boxes}_np`."
    return _find_file(root, RAW_FILE, advice)


def _extract_once(root: Path, boxes: str) -> Path:
    folder = root / f"images_{boxes}"
    if not folder.is_dir():
        extract_images(_find_raw_file(root, boxes), boxes, folder)
    return folder


def _list_new(listing: Listing, boxes: str) -> None:
    advice = f"It comes from {_CONFIGURATION_SOURCE}; put it there."
    configuration = _find_file(listing.root, f"cuhk03_new_protocol_config_{boxes}.mat", advice)
    splits = read_new_protocol(configuration)
    folder = _extract_once(listing.root, boxes)
    present = {path.name for path in folder.iterdir()}
    missing = sorted({name for names in splits.values() for name in names} - present)
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} images that {configuration.name} names (first: {missing[0]}). Delete the "
            f"folder: it is made again from {RAW_FILE}."
        )
    for split, names in splits.items():
        for name in names:
            match = PNG_NAME.fullmatch(name)
            if match is None:
                raise DataError(f"{configuration} names {name!r}, which is not of the form {PNG_EXAMPLE}. {advice}")
            listing.crops.append(Crop(f"{folder.name}/{name}", split, match["person"], match["view"]))


def _list_classic(listing: Listing, boxes: str, trial: int) -> None:
    tested = read_test_people(_find_raw_file(listing.root, boxes), trial)
    folder = _extract_once(listing.root, boxes)
    for path, match in find_named(listing, folder, PNG_NAME, PNG_EXAMPLE):
        split = "gallery" if match["person"] in tested else "train"
        listing.crops.append(Crop(path, split, match["person"], match["view"]))
    listing.protocol = {"query_is_gallery": True, "trial": trial}

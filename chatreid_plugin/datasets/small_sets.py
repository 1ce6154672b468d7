"""Small sets without a published single split: CUHK01, CUHK02 and VIPeR train; Occluded-REID tests.

Layouts as torchreid reads them (torchreid/data/datasets/image); shared notes on protocols, section 5.
"""

import re

from ..config import SourceSettings
from ..records import Split
from .listing import Crop, Listing, find_root
from .walking import find_named


CUHK01_NAME = re.compile(r"(?P<person>\d{4})00(?P<image>[1-4])\.png", re.IGNORECASE | re.ASCII)
CUHK02_NAME = re.compile(r"(?P<pair>P[1-5])/(?P<camera>cam[12])/(?P<person>\d+)_.*\.png", re.IGNORECASE | re.ASCII)
CUHK02_PAIRS = ("P1", "P2", "P3", "P4", "P5")
VIPER_NAME = re.compile(r"cam_(?P<camera>[ab])/(?P<person>\d+)_\d+\.bmp", re.IGNORECASE | re.ASCII)
OCCLUDED_NAME = re.compile(r"(?P<person>\d+)/[^/]+\.(?:tif|jpg|png)", re.IGNORECASE | re.ASCII)
OCCLUDED_FOLDERS: dict[str, Split] = {"occluded_body_images": "query", "whole_body_images": "gallery"}


def list_cuhk01(source: SourceSettings) -> Listing:
    """List ``campus``: images 1 and 2 of a person are camera 1, images 3 and 4 camera 2. All people train.

    Raises:
        DataError: the folder is missing or holds no image of the published name form.
    """
    listing = Listing(find_root(source.root, ["campus"], "CUHK01", ["CUHK01", "cuhk01"]))
    for path, match in find_named(listing, listing.root / "campus", CUHK01_NAME, "0001001.png"):
        listing.crops.append(Crop(path, "train", match["person"], "1" if match["image"] in "12" else "2"))
    return listing


def list_cuhk02(source: SourceSettings) -> Listing:
    """List the five camera pairs, whose numbers of people and cameras each start again. All people train.

    Raises:
        DataError: a pair is missing or holds no image of the published name form.
    """
    listing = Listing(find_root(source.root, CUHK02_PAIRS, "CUHK02", ["Dataset", "CUHK02/Dataset", "cuhk02/Dataset"]))
    for pair in CUHK02_PAIRS:
        folder = listing.root / pair
        for path, match in find_named(listing, folder, CUHK02_NAME, "P1/cam1/001_0000.png", parents=2):
            person, camera = f"{pair}_{match['person']}", f"{pair}_{match['camera']}"
            listing.crops.append(Crop(path, "train", person, camera))
    return listing


def list_viper(source: SourceSettings) -> Listing:
    """List ``cam_a`` and ``cam_b``, one image of each person in each. All people train.

    Raises:
        DataError: a folder is missing or holds no image of the published name form.
    """
    listing = Listing(find_root(source.root, ["cam_a", "cam_b"], "VIPeR", ["VIPeR", "VIPeR.v1.0/VIPeR"]))
    for folder in ("cam_a", "cam_b"):
        found = find_named(listing, listing.root / folder, VIPER_NAME, "cam_a/000_45.bmp", parents=1)
        for path, match in found:
            listing.crops.append(Crop(path, "train", match["person"], match["camera"]))
    return listing


def list_occludedreid(source: SourceSettings) -> Listing:
    """List the occluded images as queries and the whole ones as gallery; no cameras, so each image has its own.

    Raises:
        DataError: a folder is missing or holds no image below a person's folder.
    """
    inner = ["Occluded_REID", "OccludedREID"]
    listing = Listing(find_root(source.root, list(OCCLUDED_FOLDERS), "Occluded-REID", inner))
    for folder, split in OCCLUDED_FOLDERS.items():
        for path, match in find_named(listing, listing.root / folder, OCCLUDED_NAME, "001/001_01.tif", parents=1):
            listing.crops.append(Crop(path, split, match["person"], path))
    return listing

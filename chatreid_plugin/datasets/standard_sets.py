"""Standard sets without a benchmark here: CUHK01, CUHK02, VIPeR, PersonX, RandPerson train, Occluded-REID tests.

Layouts as torchreid reads them (torchreid/data/datasets/image) and as the READMEs of PersonX and RandPerson say;
shared notes on protocols, section 5.
"""

import re
from pathlib import Path

from ..config import SourceSettings
from ..errors import DataError
from ..records import Split
from .listing import Crop, DataSet, Listing, check_folder, find_named, find_root
from .market1501 import MARKET_FOLDERS


CUHK01_NAME = re.compile(r"(?P<person>\d{4})00(?P<image>[1-4])\.png", re.IGNORECASE | re.ASCII)
CUHK02_NAME = re.compile(r"(?P<pair>P[1-5])/(?P<camera>cam[12])/(?P<person>\d+)_.*\.png", re.IGNORECASE | re.ASCII)
CUHK02_PAIRS = ("P1", "P2", "P3", "P4", "P5")
VIPER_NAME = re.compile(r"cam_(?P<camera>[ab])/(?P<person>\d+)_\d+\.bmp", re.IGNORECASE | re.ASCII)
OCCLUDED_NAME = re.compile(r"(?P<person>\d+)/[^/]+\.(?:tif|jpg|png)", re.IGNORECASE | re.ASCII)
OCCLUDED_FOLDERS: dict[str, Split] = {"occluded_body_images": "query", "whole_body_images": "gallery"}
PERSONX_NAME = re.compile(r"(?P<person>\d+)_c(?P<camera>\d+)(?:s\d+)?(?:_.*)?\.jpg", re.IGNORECASE | re.ASCII)
# Two releases: scene before camera, and camera before scene.
RANDPERSON_NAME = re.compile(
    r"(?P<person>\d{6})_(?:s(?P<scene>\d{2})_c(?P<camera>\d{2})|c(?P<old_camera>\d{2})_s(?P<old_scene>\d{2}))_f\d+\.jpg",
    re.IGNORECASE | re.ASCII,
)
# The last frame of each walk, which the authors moved out of the set.
RANDPERSON_LEFT_OUT = "delete_"


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


def list_personx(source: SourceSettings) -> Listing:
    """List PersonX: one background, or several in numbered folders; a background is a camera.

    Raises:
        DataError: a folder is missing or holds no image of the published name form.
    """
    inner = source.root / "PersonX_v1"
    listing = Listing(inner if inner.is_dir() else source.root)
    for background in _find_backgrounds(listing.root):
        for folder, split in MARKET_FOLDERS.items():
            for path, match in find_named(listing, background / folder, PERSONX_NAME, "0001_c3s1_05.jpg"):
                listing.crops.append(Crop(path, split, match["person"], match["camera"]))
    return listing


def _find_backgrounds(root: Path) -> list[Path]:
    """Return the folders that hold PersonX's three: the root itself, or one for each background (1 to 6)."""
    check_folder(root)
    if all((root / folder).is_dir() for folder in MARKET_FOLDERS):
        return [root]
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name.isdigit())
    for folder in folders:
        find_root(folder, list(MARKET_FOLDERS), "PersonX")
    if not folders:
        raise DataError(
            f"{root} holds neither {', '.join(MARKET_FOLDERS)} nor a folder for each background (1 to 6) of PersonX. "
            "Set `root` to the folder that holds them (`chatreid list personx` shows the layout)."
        )
    return folders


def list_randperson(source: SourceSettings) -> Listing:
    """List every image below the root, in the name form of either release. All people train.

    Camera numbers start again in each scene, so a camera is ``s<scene>_c<camera>``.

    Raises:
        DataError: no image has a published name form.
    """
    check_folder(source.root)
    listing = Listing(source.root)
    for path, match in find_named(listing, source.root, RANDPERSON_NAME, "000000_s00_c00_f000264.jpg"):
        if any(part.startswith(RANDPERSON_LEFT_OUT) for part in path.split("/")):
            listing.skip("left out by the authors (delete_ folder)")
            continue
        scene, camera = match["scene"] or match["old_scene"], match["camera"] or match["old_camera"]
        listing.crops.append(Crop(path, "train", match["person"], f"s{scene}_c{camera}"))
    return listing


DATASETS = {
    "cuhk01": DataSet(list_cuhk01),
    "cuhk02": DataSet(list_cuhk02),
    "viper": DataSet(list_viper),
    "occludedreid": DataSet(list_occludedreid),
    "personx": DataSet(list_personx),
    "randperson": DataSet(list_randperson),
}

"""Long-term sets, where people change clothes: Celeb-reID, DeepChange, LaST, VC-Clothes (shared notes, section 5)."""

import re

from ..config import SourceSettings
from ..errors import ConfigError, DataError
from ..records import Split
from .catalog import get_variant
from .listing import Crop, Listing, check_files, find_root, read_lines
from .walking import find_named


FOLDERS: dict[str, Split] = {"train": "train", "query": "query", "gallery": "gallery"}

CELEB_FOLDERS = {"full": "Celeb-reID", "light": "Celeb-reID-light"}
CELEB_NAME = re.compile(r"(?P<person>\d+)_\d+_\d+\.jpg", re.IGNORECASE | re.ASCII)

DEEPCHANGE_FOLDERS: dict[str, Split] = {
    "train-set": "train",
    "val-set-query": "val",
    "val-set-gallery": "val",
    "test-set-query": "query",
    "test-set-gallery": "gallery",
}
DEEPCHANGE_NAME = re.compile(
    r"(?P<person>P\d+)_(?P<camera>C\d+)_(?P<clothes>[^_./]+)(?:_[^/]*)?\.jpg", re.IGNORECASE | re.ASCII
)

LAST_FOLDERS: dict[str, Split] = {
    "train": "train",
    "val/query": "val",
    "val/gallery": "val",
    "test/query": "query",
    "test/gallery": "gallery",
}
LAST_NAME = re.compile(r"(?P<person>\d+)_(?:.*_)?(?P<clothes>[^_]+)\.jpg", re.IGNORECASE | re.ASCII)

VCCLOTHES_NAME = re.compile(r"(?P<person>\d+)-0*(?P<camera>[1-4])-(?P<clothes>\d+)-\d+\.jpg", re.IGNORECASE | re.ASCII)


def list_celebreid(source: SourceSettings) -> Listing:
    """List Celeb-reID (variant ``full``) or Celeb-reID-light (``light``), which differ by their folder alone.

    The images come from the web: no cameras, so each image is a camera of its own, and no clothes labels. Nothing says
    whether the numbers of the test people go on from the training people's, so they get a prefix.

    Raises:
        ConfigError: the folder is that of the light version and the variant is not.
        DataError: a folder is missing or holds no image of the published name form.
    """
    variant = get_variant(source)
    root = find_root(source.root, list(FOLDERS), "Celeb-reID", [CELEB_FOLDERS[variant]])
    if "light" in root.name.lower() and variant != "light":
        raise ConfigError(f"Source {source.name}: {root} is Celeb-reID-light. Set variant: light.")
    listing = Listing(root)
    for folder, split in FOLDERS.items():
        for path, match in find_named(listing, root / folder, CELEB_NAME, "1_1_0.jpg"):
            person = match["person"] if split == "train" else f"test_{match['person']}"
            listing.crops.append(Crop(path, split, person, path))
    return listing


def list_deepchange(source: SourceSettings) -> Listing:
    """List the images of the five ``*-bbox.txt`` files; both parts of the validation set become ``val``.

    The published evaluation ignores gallery images of the query's tracklet, not of its camera (Simple-CCReID,
    data/datasets/deepchange.py): ``protocol["tracklets"]`` has path -> tracklet of the test images.

    Raises:
        DataError: a folder, list or image is missing, or a line is not ``<image name>,<tracklet>``.
    """
    lists = [f"{folder}-bbox.txt" for folder in DEEPCHANGE_FOLDERS]
    inner = ["DeepChangeDataset", "DeepChange"]
    listing = Listing(find_root(source.root, [*DEEPCHANGE_FOLDERS, *lists], "DeepChange", inner))
    tracklets: dict[str, str] = {}
    for folder, split in DEEPCHANGE_FOLDERS.items():
        list_path = listing.root / f"{folder}-bbox.txt"
        for number, line in read_lines(list_path):
            name, *rest = (part.strip() for part in line.split(","))
            match = DEEPCHANGE_NAME.fullmatch(name)
            if match is None or not rest or not rest[0].isdigit():
                raise DataError(
                    f"{list_path}, line {number}: expected <image name>,<tracklet> as in P12_C3_4_000567.jpg,89; "
                    f"found {line!r}. Get the list from the data set's authors."
                )
            path = f"{folder}/{name}"
            listing.crops.append(Crop(path, split, match["person"], match["camera"], match["clothes"]))
            if split in ("query", "gallery"):
                tracklets[path] = rest[0]
    check_files(listing, [crop.path for crop in listing.crops])
    listing.protocol["tracklets"] = tracklets
    return listing


def list_last(source: SourceSettings) -> Listing:
    """List LaST; both parts of the validation set become ``val``.

    It is taken from films: each image is a camera of its own. Clothes labels exist for the training people alone.
    The people of the three sets differ (10,862 in all), and nothing says that their numbers do, so those of the
    validation and test people get a prefix.

    Raises:
        DataError: a folder is missing or holds no image of the published name form.
    """
    listing = Listing(find_root(source.root, list(LAST_FOLDERS), "LaST", ["last", "LaST"]))
    for folder, split in LAST_FOLDERS.items():
        prefix = "" if split == "train" else f"{folder.partition('/')[0]}_"
        for path, match in find_named(listing, listing.root / folder, LAST_NAME, "000001_s000123_0002_1.jpg"):
            clothes = match["clothes"] if split == "train" else None
            listing.crops.append(Crop(path, split, prefix + match["person"], path, clothes))
    return listing


def list_vcclothes(source: SourceSettings) -> Listing:
    """List VC-Clothes; ``protocol`` names the camera pairs of its two settings (Simple-CCReID, vcclothes.py).

    Raises:
        DataError: a folder is missing or holds no image of the published name form.
    """
    listing = Listing(find_root(source.root, list(FOLDERS), "VC-Clothes", ["VC-Clothes"]))
    for folder, split in FOLDERS.items():
        for path, match in find_named(listing, listing.root / folder, VCCLOTHES_NAME, "001-01-02-03.jpg"):
            listing.crops.append(Crop(path, split, match["person"], match["camera"], match["clothes"]))
    listing.protocol |= {"same_clothes_cameras": ["2", "3"], "cross_clothes_cameras": ["3", "4"]}
    return listing

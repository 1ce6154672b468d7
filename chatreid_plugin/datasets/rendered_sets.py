"""Sets of rendered people: PersonX and RandPerson (shared notes on protocols, section 5, and their READMEs)."""

import re
from pathlib import Path

from ..config import SourceSettings
from ..errors import DataError
from ..records import Split
from .listing import Crop, Listing, check_folder, find_root
from .walking import find_named


PERSONX_FOLDERS: dict[str, Split] = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
PERSONX_NAME = re.compile(r"(?P<person>\d+)_c(?P<camera>\d+)(?:s\d+)?(?:_.*)?\.jpg", re.IGNORECASE | re.ASCII)
# Two releases: scene before camera, and camera before scene.
RANDPERSON_NAME = re.compile(
    r"(?P<person>\d{6})_(?:s(?P<scene>\d{2})_c(?P<camera>\d{2})|c(?P<old_camera>\d{2})_s(?P<old_scene>\d{2}))_f\d+\.jpg",
    re.IGNORECASE | re.ASCII,
)
# The last frame of each walk, which the authors moved out of the set.
RANDPERSON_LEFT_OUT = "delete_"


def _find_backgrounds(root: Path) -> list[Path]:
    """Return the folders that hold PersonX's three: the root itself, or one for each background (1 to 6)."""
    check_folder(root)
    if all((root / folder).is_dir() for folder in PERSONX_FOLDERS):
        return [root]
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name.isdigit())
    for folder in folders:
        find_root(folder, list(PERSONX_FOLDERS), "PersonX")
    if not folders:
        raise DataError(
            f"{root} holds neither {', '.join(PERSONX_FOLDERS)} nor a folder for each background (1 to 6) of PersonX. "
            "Set `root` to the folder that holds them (`chatreid list personx` shows the layout)."
        )
    return folders


def list_personx(source: SourceSettings) -> Listing:
    """List PersonX: one background, or several in numbered folders; a background is a camera.

    Raises:
        DataError: a folder is missing or holds no image of the published name form.
    """
    inner = source.root / "PersonX_v1"
    listing = Listing(inner if inner.is_dir() else source.root)
    for background in _find_backgrounds(listing.root):
        for folder, split in PERSONX_FOLDERS.items():
            for path, match in find_named(listing, background / folder, PERSONX_NAME, "0001_c3s1_05.jpg"):
                listing.crops.append(Crop(path, split, match["person"], match["camera"]))
    return listing


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

"""Market-1501 (shared notes on protocols, section 1.1): counts were taken from its published label files."""

import re

from ..config import SourceSettings
from ..records import Split
from .listing import JUNK, JUNK_REASON, Crop, Listing, find_root
from .walking import find_named


MARKET_NAME = re.compile(r"(?P<person>-1|\d{4})_c(?P<camera>[1-6])s\d_\d{6}_\d{2}\.jpg", re.IGNORECASE | re.ASCII)
MARKET_EXAMPLE = "0002_c1s1_000451_03.jpg"
MARKET_FOLDERS: dict[str, Split] = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}


def list_market1501(source: SourceSettings) -> Listing:
    """List ``bounding_box_train``, ``query`` and ``bounding_box_test``.

    Junk (identity -1) is left out, as in every peer's evaluation; distractors (identity 0000) stay in the gallery and
    match nobody.

    Raises:
        DataError: a folder is missing or holds no image of the published name form.
    """
    listing = Listing(find_root(source.root, list(MARKET_FOLDERS), "Market-1501", ["Market-1501-v15.09.15"]))
    for folder, split in MARKET_FOLDERS.items():
        for path, match in find_named(listing, listing.root / folder, MARKET_NAME, MARKET_EXAMPLE):
            if match["person"] == JUNK:
                listing.skip(JUNK_REASON)
            else:
                listing.crops.append(Crop(path, split, match["person"], match["camera"]))
    return listing

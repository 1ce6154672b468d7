"""Market-1501 (shared notes on protocols, section 1.1): counts were taken from its published label files."""

import re
from dataclasses import replace

from ..config import SourceSettings
from ..records import ImageRecord, Split
from .benchmark import Benchmark, BenchmarkRules, Choices, SkippedQuery, Source
from .listing import JUNK, JUNK_REASON, Crop, DataSet, Listing, find_named, find_root


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


def load_market1501(source: Source, choices: Choices) -> Benchmark:
    """Single query; the gallery has the distractors (identity 0) and not the junk (-1), which the parser left out.

    Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.
    """
    asking = [record for record in source.queries if not _is_distractor(record)]
    skipped = [
        SkippedQuery(record.image_id, f"identity {record.person_id} is absent from the gallery")
        for record in source.queries
        if _is_distractor(record)
    ]
    return replace(source.ask_with_images("single query", asking=asking), skipped=tuple(skipped))


def _is_distractor(record: ImageRecord) -> bool:
    """Market-1501 publishes distractors as identity 0; they are nobody's match."""
    return record.person_id.rpartition(":")[2].strip("0") == ""


DATASETS = {"market1501": DataSet(list_market1501)}
BENCHMARKS = {"market1501": BenchmarkRules(load_market1501, "market1501", sizes={(): (3368, 15913)})}

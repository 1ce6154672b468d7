"""MSMT17 in its two versions and as the Market-style repack (shared notes on protocols, section 1.2)."""

import re
from pathlib import Path

from ..config import SourceSettings
from ..errors import DataError
from ..records import Split
from .benchmark import Benchmark, BenchmarkRules, Choices, Source
from .catalog import get_variant
from .label_files import read_lines
from .listing import Crop, DataSet, Listing, check_files, find_named, find_root
from .market1501 import MARKET_FOLDERS


# Variant -> its folders; of v1 and v2 the first holds the training people, the second the tested ones.
FOLDERS: dict[str, tuple[str, ...]] = {
    "v1": ("train", "test"),
    "v2": ("mask_train_v2", "mask_test_v2"),
    "market": tuple(MARKET_FOLDERS),
}
# Between `root` and these folders, as the archives unpack and as TransReID, CLIP-ReID and SOLIDER expect (MSMT17).
INNER = ("MSMT17_V1", "MSMT17_V2", "MSMT17", "MSMT17_V1/MSMT17_V1", "MSMT17_V2/MSMT17_V2")
LISTS: dict[str, Split] = {
    "list_train.txt": "train",
    "list_val.txt": "val",
    "list_query.txt": "query",
    "list_gallery.txt": "gallery",
}
LINE = re.compile(r"(?P<path>\d{4}/[^\s/]+)\s+(?P<person>\d+)", re.ASCII)
LINE_EXAMPLE = "0000/0000_000_01_0303morning_0008_0.jpg 0"
_AFTER_PERSON = r"\d{3}_(?P<camera>\d{2})_\d{4}(?:morning|noon|afternoon)_\d{4}_\d+(?:_ex)?"
MSMT_NAME = re.compile(rf"\d{{4}}_{_AFTER_PERSON}\.jpe?g", re.IGNORECASE | re.ASCII)
# Most repacks rename the images as Market-1501 does, some keep the published names.
REPACK_NAME = re.compile(
    rf"(?P<person>\d{{4}})_(?:c(?P<renamed>\d{{1,2}})(?:s\d+)?(?:_\d+)+|{_AFTER_PERSON})\.jpe?g",
    re.IGNORECASE | re.ASCII,
)
REPACK_EXAMPLE = "0781_c11_0015.jpg"


def _name_person(number: int, split: Split) -> str:
    """Return the person's label: train and test people are both numbered from 0, so tested ones get a prefix."""
    return f"{number:04d}" if split in ("train", "val") else f"test_{number:04d}"


def list_msmt17(source: SourceSettings) -> Listing:
    """List MSMT17: variant ``v1`` (faces visible), ``v2`` (faces blurred) or ``market`` (repack without lists).

    The published numbers start again in the test set (train 0 to 1040, test 0 to 3059). A person of the train and
    val lists is called ``0000``, a person of the query and gallery lists ``test_0000``.

    Raises:
        ConfigError: an unknown variant.
        DataError: the variant's folders or a list file are missing; a list names an image that is not there.
    """
    variant = get_variant(source)
    listing = Listing(_find_variant(source.root, variant))
    if variant == "market":
        _list_repack(listing)
    else:
        _list_published(listing, *FOLDERS[variant])
    return listing


def _find_variant(root: Path, variant: str) -> Path:
    present = [
        name
        for name, folders in FOLDERS.items()
        if any(all((root / inner / folder).is_dir() for folder in folders) for inner in ("", *INNER))
    ]
    if present and variant not in present:
        raise DataError(
            f"{root} holds {', '.join(FOLDERS[present[0]])}: that is MSMT17 {present[0]}, not {variant} "
            f"({', '.join(FOLDERS[variant])}). Set `variant: {present[0]}`, or `root` to the other version."
        )
    return find_root(root, FOLDERS[variant], f"MSMT17 {variant}", INNER)


def _list_published(listing: Listing, train_folder: str, test_folder: str) -> None:
    listed: dict[str, str] = {}
    for name, split in LISTS.items():
        folder = train_folder if split in ("train", "val") else test_folder
        file = listing.root / name
        if not file.is_file():
            raise DataError(
                f"List file {name} of MSMT17 is missing: it belongs into {listing.root}, beside {folder}, and comes "
                "with the data set. Its lines are the labels, such as "
                f"`{LINE_EXAMPLE}`. A copy without lists but with bounding_box_* folders is `variant: market`."
            )
        for number, line in read_lines(file):
            where = f"{file}, line {number}"
            match = LINE.fullmatch(line)
            published = match and MSMT_NAME.fullmatch(match["path"].rpartition("/")[2])
            if match is None or published is None:
                raise DataError(f"{where}: {line!r} is not of the form `{LINE_EXAMPLE}`. Copy the lists again.")
            path = f"{folder}/{match['path']}"
            if path in listed:
                raise DataError(
                    f"{where}: {match['path']} was listed before, in {listed[path]}. Copy the lists again."
                )
            listed[path] = where
            person = _name_person(int(match["person"]), split)
            listing.crops.append(Crop(path, split, person, published["camera"]))
    check_files(listing)


def _list_repack(listing: Listing) -> None:
    for folder, split in MARKET_FOLDERS.items():
        for path, match in find_named(listing, listing.root / folder, REPACK_NAME, REPACK_EXAMPLE):
            person = _name_person(int(match["person"]), split)
            listing.crops.append(Crop(path, split, person, match["renamed"] or match["camera"]))


def load_msmt17(source: Source, choices: Choices) -> Benchmark:
    """Test lists as published; V1 or V2 is the manifest's variant (Wei et al., CVPR 2018)."""
    return source.ask_with_images(f"{(source.variant or 'v1').upper()}, single query")


DATASETS = {"msmt17": DataSet(list_msmt17)}
BENCHMARKS = {
    "msmt17": BenchmarkRules(
        load_msmt17, "msmt17", choices={"variant": ("v1", "v2", "market")}, sizes={(): (11659, 82161)}
    )
}

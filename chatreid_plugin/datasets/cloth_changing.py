"""Sets in which people change clothes: LTCC and PRCC with their benchmarks, and sets to train on.

Celeb-reID, DeepChange, LaST and VC-Clothes have no benchmark here. Shared notes on protocols, sections 1.4, 1.5 and 5.
"""

import re
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np

from ..archives import IntArray
from ..config import SourceSettings
from ..errors import ConfigError, DataError
from ..records import Split
from .benchmark import Benchmark, BenchmarkRules, Choices, Rule, Source
from .catalog import get_variant
from .label_files import read_lines
from .listing import Crop, DataSet, Listing, check_files, find_named, find_root


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


LTCC_RULES: dict[str, Rule] = {"cc": "cloth_changing", "standard": "same_camera", "sc": "same_clothes"}
# PRCC: people wear the same before cameras A and B; the gallery is A.
PRCC_QUERY_CAMERAS = {"same_clothes": "B", "cross_clothes": "C"}


def load_ltcc(source: Source, choices: Choices) -> Benchmark:
    """Standard, cloth-changing (``cc``) or same-clothes (``sc``) setting (Qian et al., ACCV 2020; Simple-CCReID).

    ``restrict: true`` keeps only the people that change clothes, in queries and gallery, as one family of papers
    does; their numbers are higher.

    Raises:
        DataError: the manifest has no clothes, or ``restrict`` and it does not name those people.
    """
    words = choices.setting
    if choices.setting != "standard":
        source.need_clothes()
    if choices.restrict:
        advice = "Parse LTCC with its info folder, or set restrict: false."
        changing = set(source.need("cloth_change_test_people", advice))
        queries, gallery = (
            [record for record in side if record.person_id.rpartition(":")[2] in changing]
            for side in (source.queries, source.gallery)
        )
        source = replace(source, queries=queries, gallery=gallery)
        words += ", clothes-changing people only"
    return source.ask_with_images(words, LTCC_RULES[choices.setting])


def draw_single_shot(people: list[str], seed: int) -> IntArray:
    """Return one gallery index for each identity, drawn at random: ascending."""
    places: dict[str, list[int]] = {}
    for place, person in enumerate(people):
        places.setdefault(person, []).append(place)
    random = Random(seed)
    return np.array(sorted(random.choice(places[person]) for person in sorted(places)), dtype=np.int64)


def load_prcc(source: Source, choices: Choices) -> Benchmark:
    """Gallery: camera A; queries: B (same clothes) or C (cross-clothes); nothing is ignored (Yang et al., TPAMI 2021).

    ``shots: multi`` ranks all of A (CAL, Simple-CCReID), ``single`` one image of each person in ten seeded trials: the
    original ones were not published. Their mAP differ by tens of points and must not be mixed.
    """
    camera = PRCC_QUERY_CAMERAS[choices.setting]
    asking = [record for record in source.queries if record.camera_id == camera]
    words = f"{choices.setting.replace('_', '-')} (camera {camera} in A), {choices.shots}-shot"
    benchmark = source.ask_with_images(words, "nothing", asking=asking)
    if choices.shots == "multi":
        return benchmark
    people = [record.person_id for record in source.gallery]
    trials = tuple(draw_single_shot(people, choices.seed + trial) for trial in range(choices.trials))
    return replace(benchmark, trials=trials)


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
    check_files(listing)
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


DATASETS = {
    "ltcc": DataSet(list_ltcc),
    "prcc": DataSet(list_prcc),
    "celebreid": DataSet(list_celebreid),
    "deepchange": DataSet(list_deepchange),
    "last": DataSet(list_last),
    "vcclothes": DataSet(list_vcclothes),
}
BENCHMARKS = {
    "ltcc": BenchmarkRules(
        load_ltcc,
        "ltcc",
        choices={"setting": ("cc", "standard", "sc"), "restrict": (False, True)},
        sizes={(): (493, 7050)},
        choice_task="cloth_changing_reid",
        top_k=500,  # 94 images on average show a person
    ),
    "prcc": BenchmarkRules(
        load_prcc,
        "prcc",
        choices={"setting": ("cross_clothes", "same_clothes"), "shots": ("multi", "single")},
        sizes={
            ("cross_clothes", "multi"): (3543, 3384),
            ("cross_clothes", "single"): (3543, 71),
            ("same_clothes", "multi"): (3873, 3384),
            ("same_clothes", "single"): (3873, 71),
        },
        choice_task="cloth_changing_reid",
    ),
}

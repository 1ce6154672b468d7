"""SYSU-MM01 (shared notes on protocols, section 1.6): six camera folders, identity lists, published test trials."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import SourceSettings
from ..errors import ConfigError, DataError
from ..records import Split
from .benchmark import Benchmark, BenchmarkRules, Choices, IntArray, Source, draw_by_camera
from .label_files import read_identities, read_matlab
from .listing import Crop, DataSet, Listing, find_named, find_root


logger = logging.getLogger(__name__)

SYSU_NAME = re.compile(r"cam(?P<camera>[1-6])/(?P<person>\d{4})/\d{4}\.jpg", re.IGNORECASE | re.ASCII)
SYSU_EXAMPLE = "cam1/0001/0001.jpg"
SYSU_CAMERAS = ("1", "2", "3", "4", "5", "6")
INFRARED_CAMERAS = ("3", "6")
PERMUTATION_FILE = "rand_perm_cam.mat"
PERMUTATION_SOURCE = "github.com/wuancong/SYSU-MM01, folder evaluation/data_split"
# Single-shot takes the first image of a trial's permutation, multi-shot the first ten.
MULTI_SHOT = 10
TRIALS = 10
SEARCH_CAMERAS = {"all": ("1", "2", "4", "5"), "indoor": ("1", "2")}
PARSE_SYSU = (
    "Put rand_perm_cam.mat into SYSU-MM01 and parse it again, or set shots: single and trials_from: agw_seed, "
    "which needs no such file."
)


def list_sysumm01(source: SourceSettings) -> Listing:
    """List ``cam1`` to ``cam6``: infrared test images are the queries, visible ones the gallery.

    ``train_id`` and ``val_id`` both train, as in every peer. ``protocol["trials"]`` holds, for each published trial,
    ``{"paths": groups}``: for each test identity and visible camera the first ten images of the trial's permutation,
    in order, so that single-shot is the first of each group and multi-shot the whole group. Without
    ``rand_perm_cam.mat`` (in the root, in ``exp`` or beside the root) there are no trials, and a warning.

    Raises:
        DataError: a folder or list is missing or wrong, or the permutations do not fit the images.
    """
    folders = [f"cam{camera}" for camera in SYSU_CAMERAS]
    listing = Listing(find_root(source.root, [*folders, "exp"], "SYSU-MM01", ["SYSU-MM01"]))
    lists = listing.root / "exp"
    test = _find_identities(lists, "test_id")
    training = _find_identities(lists, "train_id") | _find_identities(lists, "val_id")
    if test & training:
        raise DataError(
            f"{lists}: identity {min(test & training)} is both in test_id and in train_id or val_id. "
            "Copy the lists of the published archive again."
        )
    for folder in folders:
        for path, match in find_named(listing, listing.root / folder, SYSU_NAME, SYSU_EXAMPLE, parents=2):
            number, infrared = int(match["person"]), match["camera"] in INFRARED_CAMERAS
            if number not in test | training:
                listing.skip("identity in no split list")
                continue
            split: Split = "train" if number in training else "query" if infrared else "gallery"
            modality = "infrared" if infrared else "visible"
            listing.crops.append(Crop(path, split, match["person"], match["camera"], modality=modality))
    _add_trials(listing)
    return listing


def _find_identities(folder: Path, name: str) -> set[int]:
    """Return the identities of ``name.txt``, or of ``name.mat`` where the text is missing."""
    path, matlab = folder / f"{name}.txt", folder / f"{name}.mat"
    if not path.is_file() and matlab.is_file():
        return {int(number) for number in _load_variable(matlab).ravel()}
    return read_identities(path)


def _load_variable(path: Path) -> np.ndarray[Any, Any]:
    """Return the one variable of a MATLAB file."""
    content = read_matlab(path)
    names = [name for name in content if not name.startswith("__")]
    if len(names) != 1:
        raise DataError(f"{path} must hold one variable, found {', '.join(names) or 'none'}. Copy it again.")
    return content[names[0]]


def _add_trials(listing: Listing) -> None:
    root = listing.root
    found = [folder / PERMUTATION_FILE for folder in (root, root / "exp", root.parent)]
    path = next((candidate for candidate in found if candidate.is_file()), None)
    if path is None:
        listing.warnings.append(
            f"no {PERMUTATION_FILE} in {root}, its exp folder or beside it: it is not in the archive but published at "
            f"{PERMUTATION_SOURCE}; without it, evaluation falls back to seeded draws of the gallery"
        )
        return
    images: dict[tuple[str, str], list[str]] = {}
    for crop in listing.crops:
        if crop.split == "gallery":
            images.setdefault((crop.person, crop.camera), []).append(crop.path)
    cells = _load_variable(path)
    groups = [_draw_group(path, cells, key, sorted(images[key])) for key in sorted(images)]
    listing.protocol["trials"] = [{"paths": list(trial)} for trial in zip(*groups, strict=True)]


def _draw_group(path: Path, cells: np.ndarray[Any, Any], key: tuple[str, str], images: list[str]) -> list[list[str]]:
    """Return, for each trial, the first ten images of one identity and camera.

    The cell of a camera holds a cell for each identity: trials x images, numbers from 1 into the sorted files.
    """
    person, camera = key
    try:
        rows = np.asarray(cells.ravel()[int(camera) - 1].ravel()[int(person) - 1]).astype(int)
        numbers = list(range(1, len(images) + 1))
        fits = len(rows) == TRIALS and all(sorted(row) == numbers for row in rows.tolist())
    except (IndexError, AttributeError, TypeError, ValueError):
        raise DataError(
            f"{path} has no permutations of identity {person}, camera {camera}. "
            f"Get the file of {PERMUTATION_SOURCE}, or move it away to evaluate with seeded draws."
        ) from None
    if not fits:
        raise DataError(
            f"{path} has {len(rows)} permutations of {rows.shape[-1]} images of identity {person}, camera {camera}; "
            f"expected {TRIALS} of the {len(images)} images that are there. Get the missing files, or move "
            f"{PERMUTATION_FILE} away to evaluate with seeded draws."
        )
    return [[images[number - 1] for number in row[:MULTI_SHOT]] for row in rows.tolist()]


def _read_published_trials(source: Source, cameras: Sequence[str], shots: int) -> list[IntArray]:
    places = {record.path: place for place, record in enumerate(source.gallery)}
    trials: list[IntArray] = []
    for trial in source.need("trials", PARSE_SYSU):
        groups = [group[:shots] for group in trial["paths"]]
        unknown = [path for group in groups for path in group if path not in places]
        if unknown:
            raise DataError(f"{source.path}: the published trials name {unknown[0]}, no gallery image. {PARSE_SYSU}")
        chosen = [places[path] for group in groups for path in group]
        trials.append(np.array(sorted(p for p in chosen if source.gallery[p].camera_id in cameras), dtype=np.int64))
    return trials


def _choose_trials_from(source: Source, choices: Choices) -> str:
    """Return where the galleries come from: as set, or the published trials, or without them AGW's seeding."""
    if choices.trials_from is not None or "trials" in source.notes or choices.shots == "multi":
        return choices.trials_from or "published"
    logger.warning(
        "%s has no published trials of SYSU-MM01 (rand_perm_cam.mat), so its galleries are drawn by AGW's seeding: "
        'the results are of the variant "%d trials (agw_seed)". For the published ones put rand_perm_cam.mat into '
        "SYSU-MM01 and parse it again.",
        source.path,
        choices.trials,
    )
    return "agw_seed"


def load_sysumm01(source: Source, choices: Choices) -> Benchmark:
    """Infrared queries (cameras 3, 6) in visible galleries; mean of ten trials (Wu et al., ICCV 2017).

    ``setting`` all or indoor; ``shots`` single or multi (ten images of each identity and camera). ``trials_from``
    published permutation, or AGW's seeding, which draws single-shot galleries only; if it is not set, what the
    manifest allows. CMC counts identities.

    Raises:
        ConfigError: AGW's seeding with multi-shot.
        DataError: the manifest lacks the published trials, and they are asked for or needed; or it is of one modality.
    """
    source = source.turn("infrared")
    cameras, trials_from = SEARCH_CAMERAS[choices.setting], _choose_trials_from(source, choices)
    if trials_from == "published":
        shots = 1 if choices.shots == "single" else MULTI_SHOT
        trials = _read_published_trials(source, cameras, shots)[: choices.trials]
    elif choices.shots == "multi":
        raise ConfigError(
            "data.trials_from: agw_seed draws single-shot galleries; set data.shots: single or data.trials_from."
        )
    else:
        trials = [draw_by_camera(source.gallery, cameras, trial) for trial in range(choices.trials)]
    words = f"{choices.setting}-search, {choices.shots}-shot, {len(trials)} trials ({trials_from})"
    return replace(source.ask_with_images(words, "same_room"), trials=tuple(trials), cmc="unique_identity")


DATASETS = {"sysumm01": DataSet(list_sysumm01)}
BENCHMARKS = {
    "sysumm01": BenchmarkRules(
        load_sysumm01,
        "sysumm01",
        choices={
            "setting": ("all", "indoor"),
            "shots": ("single", "multi"),
            "trials_from": ("published", "agw_seed"),
        },
        sizes={
            ("all", "single"): (3803, 301),
            ("all", "multi"): (3803, 3010),
            ("indoor", "single"): (3803, 112),
            ("indoor", "multi"): (3803, 1120),
        },
        choice_task="visible_infrared_reid",
        training={"trials_from": "agw_seed", "shots": "single"},
    )
}

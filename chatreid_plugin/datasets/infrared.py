"""RegDB and LLCM (shared notes on protocols, sections 1.7 and 1.8): list files of visible and infrared images."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import SourceSettings
from ..errors import ConfigError, DataError
from ..records import Modality, Split
from .benchmark import Benchmark, BenchmarkRules, Choices, Source, draw_by_camera
from .label_files import read_identities, read_lines
from .listing import Crop, DataSet, Listing, check_files, find_named, find_root


REGDB_TRIALS = 10
REGDB_PATH = re.compile(r"(?P<folder>Visible|Thermal)/(?P<person>\d+)/[^/]+", re.ASCII)
REGDB_EXAMPLE = "Visible/285/male_back_v_05528_285.bmp 0"
REGDB_LISTS: dict[str, Modality] = {"visible": "visible", "thermal": "infrared"}
LLCM_TRAIN = re.compile(
    r"(?:\w[^/]*/)*(?P<person>\d{4})/(?P=person)_c(?P<camera>\d{2})_s\d+_f\d+_(?:vis|nir)\.jpg",
    re.IGNORECASE | re.ASCII,
)
LLCM_EXAMPLE = "vis/0001/0001_c01_s185535_f7010_vis.jpg 0"
LLCM_TEST = re.compile(r"cam(?P<camera>[1-9])/(?P<person>\d{4})/[^/]+", re.ASCII)
LLCM_TEST_EXAMPLE = "cam1/0003/0003_c01_s185734_f3195_nir.jpg"
LLCM_LISTS: dict[str, Modality] = {"vis": "visible", "nir": "infrared"}


@dataclass(slots=True)
class _Labels:
    """The labels of one split's lists: numbers from 0 that stand for one identity each, in both modalities."""

    people: dict[str, str] = field(default_factory=dict[str, str])
    numbers: dict[str, str] = field(default_factory=dict[str, str])

    def check(self, label: str, person: str, where: str) -> None:
        if self.people.setdefault(label, person) != person or self.numbers.setdefault(person, label) != label:
            raise DataError(
                f"{where}: identity {person} has label {label}, but elsewhere in this split label {label} is identity "
                f"{self.people[label]} and identity {person} has label {self.numbers.get(person)}. "
                "The lists were mixed up; copy those of the published archive again."
            )


def list_regdb(source: SourceSettings) -> Listing:
    """List trial ``source.trial`` of RegDB: visible test images are split ``query``, thermal ones ``gallery``.

    Which side searches which is the evaluation's choice; ``protocol`` keeps the trial. The true identity is the
    directory; the labels of the lists start at 0 in every split and are only checked.

    Raises:
        ConfigError: the trial is not 1 to 10.
        DataError: a list or image is missing, a line is wrong, or an identity is both trained and tested.
    """
    if source.trial > REGDB_TRIALS:
        raise ConfigError(f"Source {source.name}: RegDB has trials 1 to {REGDB_TRIALS}, not {source.trial}.")
    listing = Listing(find_root(source.root, ["Visible", "Thermal", "idx"], "RegDB", ["RegDB"]))
    for part in ("train", "test"):
        labels = _Labels()
        for name, modality in REGDB_LISTS.items():
            split: Split = "train" if part == "train" else "query" if name == "visible" else "gallery"
            lines = listing.root / "idx" / f"{part}_{name}_{source.trial}.txt"
            for where, path, match in _read_labelled(lines, REGDB_PATH, REGDB_EXAMPLE, labels):
                if match["folder"].lower() != name:
                    raise DataError(f"{where}: {path} stands in a list of {name} images. Copy the lists again.")
                listing.crops.append(Crop(path, split, match["person"], name, modality=modality))
    _check_crops(listing)
    check_files(listing)
    listing.protocol["trial"] = source.trial
    return listing


def list_llcm(source: SourceSettings) -> Listing:
    """List LLCM: training images by ``idx/train_{vis,nir}.txt``, test images by folder and ``idx/test_id.txt``.

    Near-infrared test images are the queries, visible ones the gallery, as the authors' code (ZYK100/LLCM) reads
    them: ``test_{vis,nir}/cam<n>/<identity>``.

    Raises:
        DataError: a folder, list or image is missing, a line is wrong, or an identity is both trained and tested.
    """
    listing = Listing(find_root(source.root, ["test_vis", "test_nir", "idx"], "LLCM", ["LLCM"]))
    labels = _Labels()
    for name, modality in LLCM_LISTS.items():
        lines = listing.root / "idx" / f"train_{name}.txt"
        for _, path, match in _read_labelled(lines, LLCM_TRAIN, LLCM_EXAMPLE, labels):
            camera = str(int(match["camera"]))
            listing.crops.append(Crop(path, "train", match["person"], camera, modality=modality))
    check_files(listing)
    tested = read_identities(listing.root / "idx" / "test_id.txt")
    for name, modality in LLCM_LISTS.items():
        split: Split = "query" if name == "nir" else "gallery"
        for path, match in find_named(listing, listing.root / f"test_{name}", LLCM_TEST, LLCM_TEST_EXAMPLE, parents=2):
            if int(match["person"]) not in tested:
                listing.skip("identity not in test_id.txt")
                continue
            listing.crops.append(Crop(path, split, match["person"], match["camera"], modality=modality))
    _check_crops(listing)
    return listing


def _read_labelled(
    path: Path, expression: re.Pattern[str], example: str, labels: _Labels
) -> Iterator[tuple[str, str, re.Match[str]]]:
    """Yield (file and line, image path, its match) of a list whose lines are ``<image path> <label>``."""
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        image, _, label = line.rpartition(" ")
        match = expression.fullmatch(image)
        if match is None or not label.isdecimal():
            raise DataError(f"{where}: {line!r} is not of the form {example!r}. Copy the list again.")
        labels.check(label, match["person"], where)
        yield where, image, match


def _check_crops(listing: Listing) -> None:
    """Refuse an identity that is both trained and tested, and an image that is listed twice."""
    trained = {crop.person for crop in listing.crops if crop.split == "train"}
    leaked = trained & {crop.person for crop in listing.crops if crop.split != "train"}
    if leaked:
        raise DataError(
            f"{listing.root}: {len(leaked)} identities are both in the training and in the test lists (first: "
            f"{min(leaked)}). Copy the lists of the published archive again."
        )
    path, count = Counter(crop.path for crop in listing.crops).most_common(1)[0]
    if count > 1:
        raise DataError(f"{listing.root}: the lists name {path} {count} times. Copy the lists again.")


def load_regdb(source: Source, choices: Choices) -> Benchmark:
    """One of ten splits, in the direction of ``setting``; nothing is ignored (Nguyen et al., Sensors 2017).

    Papers quote the mean over ten splits, each with a model of its own: ``{trial}`` in the manifest and the model.
    """
    split = f"split {source.notes.get('trial', '?')}"
    words = f"{choices.setting.replace('_', ' ')}, {split}"
    return replace(_turn(source, choices).ask_with_images(words, "nothing"), split=split)


def load_llcm(source: Source, choices: Choices) -> Benchmark:
    """One gallery image of each identity and camera, ten seeded trials, CMC over identities (Zhang & Wang, CVPR 2023).

    ``setting`` names the direction; same identity and same camera are ignored (their DEEN code, eval_llcm).
    """
    source = _turn(source, choices)
    cameras = sorted({record.camera_id for record in source.gallery})
    trials = tuple(draw_by_camera(source.gallery, cameras, trial) for trial in range(choices.trials))
    words = f"{choices.setting.replace('_', ' ')}, {len(trials)} trials"
    return replace(source.ask_with_images(words), trials=trials, cmc="unique_identity")


def _turn(source: Source, choices: Choices) -> Source:
    return source.turn("visible" if choices.setting.startswith("visible") else "infrared")


DATASETS = {"regdb": DataSet(list_regdb), "llcm": DataSet(list_llcm)}
BENCHMARKS = {
    "regdb": BenchmarkRules(
        load_regdb,
        "regdb",
        choices={"setting": ("visible_to_infrared", "infrared_to_visible")},
        sizes={(): (2060, 2060)},
        choice_task="visible_infrared_reid",
    ),
    "llcm": BenchmarkRules(
        load_llcm,
        "llcm",
        choices={"setting": ("infrared_to_visible", "visible_to_infrared")},
        sizes={("infrared_to_visible",): (7166, None), ("visible_to_infrared",): (8680, None)},
        choice_task="visible_infrared_reid",
    ),
}

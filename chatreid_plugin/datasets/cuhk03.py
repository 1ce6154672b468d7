"""CUHK03: the raw ``cuhk-03.mat`` with the new or the classic protocol, and the pre-split CUHK03-NP folders.

Rules, counts and the structure of the MATLAB files: shared notes on protocols, section 1.3. ``cuhk-03.mat`` is HDF5,
which keeps MATLAB's arrays with their axes reversed, and a cell array as references to its cells.
"""

import os
import re
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..config import SourceSettings
from ..errors import ConfigError, DataError
from ..pixels import save_image
from ..records import Split
from ..regular_files import check_regular
from .benchmark import Benchmark, BenchmarkRules, Choices, Source
from .catalog import get_variant
from .label_files import read_matlab
from .listing import Crop, DataSet, Listing, check_folder, find_named, find_root
from .market1501 import MARKET_FOLDERS


if TYPE_CHECKING:
    import h5py

PNG_NAME = re.compile(r"(?P<person>[1-5]_\d{3})_(?P<view>[12])_\d{2}\.png", re.IGNORECASE | re.ASCII)
PNG_EXAMPLE = "1_001_1_01.png"
NP_NAME = re.compile(r"(?P<person>\d{4})_c(?P<camera>[12])_\d+\.(?:png|jpg)", re.IGNORECASE | re.ASCII)
NP_EXAMPLE = "0003_c1_21.png"
RAW_FILE = "cuhk-03.mat"
_CONFIGURATION_SOURCE = "github.com/zhunzhong07/person-re-ranking, evaluation/data/CUHK03"
# The first five cells of a person are of the camera pair's first view, the other five of its second.
_IMAGES_PER_VIEW = 5
# Of one array, and how many people and images there may be: the published file has 1,467 and 14,097 of each kind.
_MOST_BYTES = 2**26
_MOST_PEOPLE = 10_000
_UNPUBLISHED = "as in no published file. Do not use it: ask the data set's authors for theirs."
_NEW_SPLITS: tuple[Split, ...] = ("train", "query", "gallery")


def list_cuhk03(source: SourceSettings) -> Listing:
    """List CUHK03 in one of its forms.

    ``detected`` and ``labeled`` are the new protocol (767 train and 700 test people), ``detected_classic`` and
    ``labeled_classic`` one of the 20 classic splits (``source.trial``: 100 test people, all others train; every test
    image is query and gallery, so it has split gallery and ``protocol`` says ``query_is_gallery``). They need
    ``cuhk-03.mat``, whose images are written once as PNG into ``images_detected`` or ``images_labeled`` beside it.
    ``detected_np`` and ``labeled_np`` are the pre-split folders of the new protocol.

    A person is called ``<pair>_<number>``, such as ``1_001``, in the NP folders ``0001``; the camera is the view.

    Raises:
        ConfigError: an unknown variant or trial.
        DataError: a file or folder is missing or damaged.
    """
    boxes, _, protocol = get_variant(source).partition("_")
    if protocol == "np":
        return _list_folders(source.root, boxes)
    check_folder(source.root)
    listing = Listing(source.root)
    if protocol == "classic":
        _list_classic(listing, boxes, source.trial)
    else:
        _list_new(listing, boxes)
    return listing


def _list_folders(root: Path, boxes: str) -> Listing:
    # The folder `detected` or `labeled` has to be there by name: inside, the two forms look alike.
    folders = [f"{boxes}/{folder}" for folder in MARKET_FOLDERS]
    listing = Listing(find_root(root, folders, f"CUHK03-NP ({boxes})", ["cuhk03-np", "CUHK03-NP"]))
    for folder, split in MARKET_FOLDERS.items():
        for path, match in find_named(listing, listing.root / boxes / folder, NP_NAME, NP_EXAMPLE):
            listing.crops.append(Crop(path, split, match["person"], match["camera"]))
    return listing


def _find_file(root: Path, name: str, advice: str) -> Path:
    for folder in (root, root / "cuhk03_release"):
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{root} holds no {name}, nor does its folder cuhk03_release. {advice}")


def _find_raw_file(root: Path, boxes: str) -> Path:
    advice = f"Ask the data set's authors for it; if you have CUHK03-NP's folders, set `variant: {boxes}_np`."
    return _find_file(root, RAW_FILE, advice)


def _extract_once(root: Path, boxes: str) -> Path:
    folder = root / f"images_{boxes}"
    if not folder.is_dir():
        extract_images(_find_raw_file(root, boxes), boxes, folder)
    return folder


def _list_new(listing: Listing, boxes: str) -> None:
    advice = f"It comes from {_CONFIGURATION_SOURCE}; put it there."
    configuration = _find_file(listing.root, f"cuhk03_new_protocol_config_{boxes}.mat", advice)
    splits = read_new_protocol(configuration)
    folder = _extract_once(listing.root, boxes)
    present = {path.name for path in folder.iterdir()}
    missing = sorted({name for names in splits.values() for name in names} - present)
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} images that {configuration.name} names (first: {missing[0]}). Delete the "
            f"folder: it is made again from {RAW_FILE}."
        )
    for split, names in splits.items():
        for name in names:
            match = PNG_NAME.fullmatch(name)
            if match is None:
                raise DataError(f"{configuration} names {name!r}, which is not of the form {PNG_EXAMPLE}. {advice}")
            listing.crops.append(Crop(f"{folder.name}/{name}", split, match["person"], match["view"]))


def _list_classic(listing: Listing, boxes: str, trial: int) -> None:
    tested = read_test_people(_find_raw_file(listing.root, boxes), trial)
    folder = _extract_once(listing.root, boxes)
    for path, match in find_named(listing, folder, PNG_NAME, PNG_EXAMPLE):
        split = "gallery" if match["person"] in tested else "train"
        listing.crops.append(Crop(path, split, match["person"], match["view"]))
    listing.protocol = {"query_is_gallery": True, "trial": trial}


@contextmanager
def _open(path: Path) -> Generator["h5py.File", None, None]:
    import h5py  # loads HDF5's libraries, which no other data set needs

    try:
        check_regular(path)
        with h5py.File(path, "r") as file:
            yield file
    except (ConfigError, DataError):
        raise
    except Exception as error:  # a damaged file makes h5py raise whatever it stumbles over
        raise DataError(
            f"{path} is not the published cuhk-03.mat (HDF5), or was cut short: {error}. Download it again."
        ) from None


def _read(file: "h5py.File", key: Any) -> np.ndarray[Any, Any]:
    """Return the MATLAB array behind a name or reference, its axes in MATLAB's order.

    HDF5 lets a data set name other files for its values, which would make their bytes pixels of an image.

    Raises:
        DataError: it is no array, lies in another file, or is larger than any published one.
    """
    import h5py

    if isinstance(key, str) and isinstance(file.get(key, getlink=True), h5py.ExternalLink):
        raise DataError(f"{file.filename}: {key} lies in another file, {_UNPUBLISHED}")
    data = file[key]
    if not isinstance(data, h5py.Dataset):
        raise DataError(f"{file.filename}: {data.name} is no array. Download it again.")
    if data.external or data.is_virtual:
        raise DataError(f"{file.filename}: the values of {data.name} lie in another file, {_UNPUBLISHED}")
    if data.size is None or data.size * data.dtype.itemsize > _MOST_BYTES:
        raise DataError(f"{file.filename}: {data.name} promises {data.shape} values, {_UNPUBLISHED}")
    return np.asarray(data).T


def _read_images(path: Path, boxes: str) -> Iterator[tuple[str, Image.Image]]:
    with _open(path) as file:
        pairs = [_read(file, reference) for reference in _read(file, boxes).ravel()]
        if sum(people.size for people in pairs) > _IMAGES_PER_VIEW * 2 * _MOST_PEOPLE:
            raise DataError(f"{path} names {sum(people.size for people in pairs):,} images, {_UNPUBLISHED}")
        with tqdm(total=sum(len(people) for people in pairs), desc=f"extract {boxes}", unit="person") as progress:
            for pair, people in enumerate(pairs, 1):
                for person, cells in enumerate(people, 1):
                    for number, reference in enumerate(cells, 1):
                        pixels = _read(file, reference)
                        # MATLAB writes the size, two numbers, in place of an empty cell.
                        if pixels.ndim == 3:
                            view = 1 if number <= _IMAGES_PER_VIEW else 2
                            yield f"{pair}_{person:03d}_{view}_{number:02d}.png", Image.fromarray(pixels)
                    progress.update()


def extract_images(path: Path, boxes: str, folder: Path) -> None:
    """Write the images of ``cuhk-03.mat`` as PNG files; ``folder`` appears only when all are written.

    Files are named ``<pair>_<person>_<view>_<image>.png``, as in the new protocol's configurations.

    Args:
        path: the file.
        boxes: ``detected`` or ``labeled``.
        folder: the folder to make.

    Raises:
        DataError: the file is damaged, or the folder cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        for name, image in _read_images(path, boxes):
            save_image(image, temporary / name)
        temporary.rename(folder)
    except OSError as error:
        raise DataError(f"The images of {path} cannot be written to {folder}: {error}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_test_people(path: Path, trial: int) -> set[str]:
    """Return the tested people (``<pair>_<person>``) of one of the classic protocol's splits, counted from 1.

    Raises:
        ConfigError: the file has no such split.
        DataError: the file is damaged.
    """
    with _open(path) as file:
        trials = _read(file, "testsets").ravel()
        rows = _read(file, trials[trial - 1]).astype(int).tolist() if trial <= len(trials) else []
        people = {f"{pair}_{person:03d}" for pair, person in rows}
    if not people:
        raise ConfigError(f"`trial: {trial}`: {path} has the test sets 1 to {len(trials)}.")
    return people


def read_new_protocol(path: Path) -> dict[Split, list[str]]:
    """Return the file names of each split of ``cuhk03_new_protocol_config_*.mat`` (767 train, 700 test people).

    Raises:
        DataError: the file is damaged or of another structure.
    """
    try:
        content = read_matlab(path)
        names = np.array([str(cell[0]) for cell in content["filelist"].ravel()])
        splits: dict[Split, list[str]] = {}
        for split in _NEW_SPLITS:
            # MATLAB counts from 1, here in 16 bits without sign.
            indices = content[f"{split}_idx"].ravel().astype(np.int64) - 1
            if indices.min() < 0:
                raise ValueError(f"{split}_idx holds an index below 1")
            splits[split] = names[indices].tolist()
        return splits
    except DataError:
        raise
    except Exception as error:  # whatever another structure makes of these lines
        raise DataError(
            f"{path} is not a published configuration of CUHK03's new protocol, or was cut short: {error}. "
            "Download it again."
        ) from None


def load_cuhk03(source: Source, choices: Choices) -> Benchmark:
    """Return the new protocol, 767 / 700 identities; detected or labelled boxes are the manifest's variant.

    Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.
    """
    return source.ask_with_images(f"new protocol 767/700, {source.variant or 'detected'} boxes")


def load_cuhk03_classic(source: Source, choices: Choices) -> Benchmark:
    """Return one of the 20 classic splits: all test images are queries and gallery; exact single-gallery-shot CMC.

    Li et al., "DeepReID", CVPR 2014; torchreid draws ten random galleries instead of taking the expectation.

    Raises:
        DataError: the manifest is of the new protocol.
    """
    split = f"split {source.need('trial', 'Parse CUHK03 with variant: detected_classic or labeled_classic.')}"
    boxes = source.variant.removesuffix("_classic") or "unknown"
    benchmark = source.ask_with_images(f"classic, {split}, {boxes} boxes", asking=source.gallery)
    return replace(benchmark, cmc="single_gallery_shot", split=split)


_BOXES = {"variant": ("detected", "labeled")}
DATASETS = {"cuhk03": DataSet(list_cuhk03)}
BENCHMARKS = {
    "cuhk03": BenchmarkRules(
        load_cuhk03, "cuhk03", choices=_BOXES, sizes={("detected",): (1400, 5332), ("labeled",): (1400, 5328)}
    ),
    "cuhk03_classic": BenchmarkRules(load_cuhk03_classic, "cuhk03", choices=_BOXES, queries_apart=False),
}

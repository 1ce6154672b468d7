"""CUHK03's MATLAB files: images and test sets of ``cuhk-03.mat`` (HDF5), and the configurations of the new protocol.

Structure: shared notes on protocols, section 1.3. HDF5 keeps MATLAB's arrays with their axes reversed, and a cell
array as references to its cells.
"""

import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image
from tqdm import tqdm

from ..crops import save_image
from ..errors import ConfigError, DataError
from ..records import Split
from ..regular_files import check_regular
from .matlab_files import read_matlab


# The first five cells of a person are of the camera pair's first view, the other five of its second.
_IMAGES_PER_VIEW = 5
# Of one array, and how many people and images there may be: the published file has 1,467 and 14,097 of each kind.
_MOST_BYTES = 2**26
_MOST_PEOPLE = 10_000
_ADVICE = "as in no published file. Do not use it: ask the data set's authors for theirs."
_NEW_SPLITS: tuple[Split, ...] = ("train", "query", "gallery")


@contextmanager
def _open(path: Path) -> Generator[h5py.File, None, None]:
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


def _read(file: h5py.File, key: Any) -> np.ndarray[Any, Any]:
    """Return the MATLAB array behind a name or reference, its axes in MATLAB's order.

    HDF5 lets a data set name other files for its values, which would make their bytes pixels of an image.

    Raises:
        DataError: it is no array, lies in another file, or is larger than any published one.
    """
    if isinstance(key, str) and isinstance(file.get(key, getlink=True), h5py.ExternalLink):
        raise DataError(f"{file.filename}: {key} lies in another file, {_ADVICE}")
    data = file[key]
    if not isinstance(data, h5py.Dataset):
        raise DataError(f"{file.filename}: {data.name} is no array. Download it again.")
    if data.external or data.is_virtual:
        raise DataError(f"{file.filename}: the values of {data.name} lie in another file, {_ADVICE}")
    if data.size is None or data.size * data.dtype.itemsize > _MOST_BYTES:
        raise DataError(f"{file.filename}: {data.name} promises {data.shape} values, {_ADVICE}")
    return np.asarray(data).T


def _read_images(path: Path, boxes: str) -> Iterator[tuple[str, Image.Image]]:
    with _open(path) as file:
        pairs = [_read(file, reference) for reference in _read(file, boxes).ravel()]
        if sum(people.size for people in pairs) > _IMAGES_PER_VIEW * 2 * _MOST_PEOPLE:
            raise DataError(f"{path} names {sum(people.size for people in pairs):,} images, {_ADVICE}")
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

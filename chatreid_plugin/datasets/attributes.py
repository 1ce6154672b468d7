"""PA-100K, PETA and RAP v1 and v2, and retrieval by attributes in any set that has them.

Their labels lie in MATLAB files (shared notes on protocols, section 5), of the structure that Rethinking_of_PAR reads
(dataset/pedes_attr/preprocess/format_*.py). The test split is the gallery: there are no queries.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..config import SourceSettings
from ..errors import ConfigError, DataError
from ..records import ImageRecord, Split
from .attribute_names import AttributeColumns
from .benchmark import RULES, Benchmark, BenchmarkRules, Choices, Query, Source
from .label_files import read_matlab
from .listing import Crop, DataSet, Listing, check_files, find_root


PA100K_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "gallery"}
# The order of the index vectors in a partition of PETA.mat and of RAP v1.
PETA_SPLITS: tuple[Split, ...] = ("train", "val", "gallery")
RAPV1_SPLITS: tuple[Split, ...] = ("train", "gallery")
RAPV2_SPLITS: dict[str, Split] = {"train_index": "train", "val_index": "val", "test_index": "gallery"}
# In PETA.mat four columns that are no attributes come first.
PETA_FIRST_ATTRIBUTE = 4
RAP_FILE = "RAP_annotation/RAP_annotation.mat"
# e.g. CAM01-2014-02-15-20140215161032-20140215162620-tarid0-frame218-line1.png
RAP_CAMERA = re.compile(r"CAM(\d{2})-", re.IGNORECASE | re.ASCII)


def list_pa100k(source: SourceSettings) -> Listing:
    """List the images that ``annotation.mat`` names; each is an identity and a camera of its own, as none are given.

    Raises:
        DataError: a file or image is missing, or the .mat is not PA-100K's.
    """
    listing = Listing(find_root(source.root, ["annotation.mat", "data"], "PA-100K", ["PA-100K", "PA100k"]))
    path = listing.root / "annotation.mat"
    file = read_matlab(path, simplify=True)
    columns = AttributeColumns(_get_texts(file, "attributes", path))
    for name, split in PA100K_SPLITS.items():
        images = _get_texts(file, f"{name}_images_name", path)
        labels = _get_labels(file, f"{name}_label", path, len(images), len(columns.names))
        for image, row in zip(images, labels, strict=True):
            listing.crops.append(_make_crop(f"data/{image}", split, columns.describe(row.tolist())))
    check_files(listing)
    return listing


def list_peta(source: SourceSettings) -> Listing:
    """List ``images/00001.png`` and so on, in the split number ``trial`` (1 to 5) of ``PETA.mat``.

    No identities or cameras are published with this file: each image has its own.

    Raises:
        ConfigError: there is no such trial.
        DataError: a file or image is missing, or the .mat is not PETA's.
    """
    listing = Listing(find_root(source.root, ["PETA.mat", "images"], "PETA", ["PETA", "peta"]))
    path = listing.root / "PETA.mat"
    fields = list(_read_structure(path, "peta", 4).values())
    matrix = _get_matrix(fields[0], "data", path)[:, PETA_FIRST_ATTRIBUTE:]
    columns = AttributeColumns(_flatten_texts(fields[1]))
    _check_shape(matrix, path, "data", len(matrix), len(columns.names))
    trial = _get_trial(fields[3], source, path)
    for index, split in _list_partition(_name_splits(trial, PETA_SPLITS, path), len(matrix), path):
        listing.crops.append(
            _make_crop(f"images/{index + 1:05d}.png", split, columns.describe(matrix[index].tolist()))
        )
    check_files(listing)
    return listing


def list_rapv1(source: SourceSettings) -> Listing:
    """List RAP v1 in the split number ``trial`` (1 to 5); each image is an identity of its own, as none are given.

    Peers read the fields of this file by position: partition, labels, Chinese and English attribute names, positions,
    image names.

    Raises:
        ConfigError: there is no such trial.
        DataError: a file or image is missing, or the .mat is not RAP v1's.
    """
    listing = Listing(find_root(source.root, [RAP_FILE, "RAP_dataset"], "RAP v1", ["RAP", "RAP1"]))
    path = listing.root / RAP_FILE
    annotation = _read_structure(path, "RAP_annotation", 6)
    if "person_identity" in annotation:
        raise DataError(f"{path} is RAP v2's file. Read it with the parser rapv2.")
    fields = list(annotation.values())
    images, columns = _flatten_texts(fields[5]), AttributeColumns(_flatten_texts(fields[3]))
    matrix = _get_matrix(fields[1], "labels", path)
    _check_shape(matrix, path, "labels", len(images), len(columns.names))
    trial = _get_trial(fields[0], source, path)
    for index, split in _list_partition(_name_splits(trial, RAPV1_SPLITS, path), len(images), path):
        listing.crops.append(_make_rap_crop(images[index], split, columns.describe(matrix[index].tolist())))
    check_files(listing)
    return listing


def list_rapv2(source: SourceSettings) -> Listing:
    """List RAP v2 in the attribute split number ``trial`` (1 to 5).

    About a third of the images have a person's number; the others (-1) are identities of their own. This split is one
    of images, so a person may be in several parts of it.

    Raises:
        ConfigError: there is no such trial.
        DataError: a file or image is missing, or the .mat is not RAP v2's.
    """
    listing = Listing(find_root(source.root, [RAP_FILE, "RAP_dataset"], "RAP v2", ["RAP2", "RAPv2", "RAP"]))
    path = listing.root / RAP_FILE
    annotation = _read_structure(path, "RAP_annotation", 6)
    if "person_identity" not in annotation:
        raise DataError(f"{path} has no person_identity. If it is RAP v1's file, read it with the parser rapv1.")
    images = _get_texts(annotation, "name", path)
    columns = AttributeColumns(_get_texts(annotation, "attribute", path))
    labels = _get_labels(annotation, "data", path, len(images), len(columns.names))
    people = np.ravel(annotation["person_identity"])
    trial = _get_trial(_get(annotation, "partition_attribute", path), source, path)
    partition: dict[Split, Any] = {split: _get(trial, name, path) for name, split in RAPV2_SPLITS.items()}
    for index, split in _list_partition(partition, len(images), path):
        person = int(people[index]) if index < len(people) else -1
        attributes = columns.describe(labels[index].tolist())
        listing.crops.append(_make_rap_crop(images[index], split, attributes, str(person) if person > 0 else None))
    check_files(listing)
    return listing


def _make_crop(path: str, split: Split, attributes: dict[str, str]) -> Crop:
    return Crop(path, split, PurePosixPath(path).stem, path, attributes=attributes)


def _make_rap_crop(name: str, split: Split, attributes: dict[str, str], person: str | None = None) -> Crop:
    path = f"RAP_dataset/{name}"
    match = RAP_CAMERA.match(name)
    person = person or PurePosixPath(path).stem
    return Crop(path, split, person, match[1] if match else path, attributes=attributes)


def _get(file: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in file:
        found = ", ".join(name for name in file if not name.startswith("__")) or "nothing"
        raise DataError(f"{path} has no {key!r} (found: {found}). It is not the published annotation file.")
    return file[key]


def _read_structure(path: Path, key: str, count: int) -> dict[str, Any]:
    """Return the structure ``key`` of a MATLAB file, which has to have at least ``count`` fields."""
    structure = _get(read_matlab(path, simplify=True), key, path)
    if not isinstance(structure, dict) or len(structure) < count:
        raise DataError(f"{path}: {key!r} is not a structure with {count} fields. Get the published file again.")
    return structure


def _flatten_texts(value: Any) -> tuple[str, ...]:
    """Return the texts of a cell array; of its first column if it has several, as peers do."""
    cells = np.atleast_1d(np.asarray(value, dtype=object))
    return tuple(str(text).strip() for text in (cells if cells.ndim == 1 else cells[:, 0]))


def _get_texts(file: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    return _flatten_texts(_get(file, key, path))


def _get_matrix(value: Any, key: str, path: Path) -> np.ndarray:
    matrix = np.asarray(value)
    if matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.number):
        raise DataError(f"{path}: {key!r} is not a matrix of numbers. Get the published file again.")
    return matrix


def _get_labels(file: Mapping[str, Any], key: str, path: Path, rows: int, columns: int) -> np.ndarray:
    matrix = _get_matrix(np.atleast_2d(_get(file, key, path)), key, path)
    _check_shape(matrix, path, key, rows, columns)
    return matrix


def _check_shape(matrix: np.ndarray, path: Path, key: str, rows: int, columns: int) -> None:
    if matrix.shape != (rows, columns):
        raise DataError(
            f"{path}: {key!r} has {matrix.shape[0]} rows and {matrix.shape[1]} columns for {rows} images and "
            f"{columns} attributes. Get the published file again."
        )


def _get_trial(partitions: Any, source: SourceSettings, path: Path) -> Mapping[str, Any]:
    """Return the index vectors of the published split number ``source.trial``."""
    found: Sequence[Any] = [partitions] if isinstance(partitions, dict) else np.ravel(partitions).tolist()
    if source.trial > len(found):
        raise ConfigError(f"Source {source.name}: there is no trial {source.trial}; {path} has 1 to {len(found)}.")
    trial = found[source.trial - 1]
    if not isinstance(trial, dict):
        raise DataError(f"{path}: the split number {source.trial} is no structure. Get the published file again.")
    return trial


def _name_splits(trial: Mapping[str, Any], splits: Sequence[Split], path: Path) -> dict[Split, Any]:
    """Return split -> index vector of a trial whose vectors are known by their order."""
    if len(trial) != len(splits):
        raise DataError(f"{path}: a split has {len(trial)} parts, not {len(splits)}. Get the published file again.")
    return dict(zip(splits, trial.values(), strict=True))


def _list_partition(partition: Mapping[Split, Any], count: int, path: Path) -> list[tuple[int, Split]]:
    """Return (index from 0, split) of each image of a partition, whose indices count from 1."""
    pairs: list[tuple[int, Split]] = [
        (int(index) - 1, split) for split, indices in partition.items() for index in np.ravel(indices)
    ]
    wrong = [index + 1 for index, _ in pairs if not 0 <= index < count]
    if wrong:
        raise DataError(f"{path}: the split names image {wrong[0]} of {count}. Get the published file again.")
    return pairs


def label_by_attributes(source: Source, choices: Choices) -> tuple[list[str], dict[str, Mapping[str, str]]]:
    """Return the attributes that are asked for, and image id to values of those that have all of them.

    Without ``attributes`` in the settings all names that every labelled gallery image has are asked for.

    Raises:
        DataError: no image has the attributes.
    """
    labelled = [record for record in source.gallery if record.attributes]
    common = sorted(set.intersection(*(set(record.attributes) for record in labelled))) if labelled else []
    names = list(choices.attributes) or common
    found: dict[str, Mapping[str, str]] = {
        record.image_id: {name: record.attributes[name] for name in names}
        for record in labelled
        if names and all(name in record.attributes for name in names)
    }
    if not found:
        known = sorted({name for record in labelled for name in record.attributes})
        raise DataError(
            f"{source.path}: no gallery image has all of the attributes {', '.join(names) or '(none)'}; "
            f"known: {', '.join(known) or 'none'}. Name some with data.attributes: [...]."
        )
    return names, found


def _name_combination(attributes: Mapping[str, str]) -> str:
    return "attributes:" + ", ".join(f"{name}={value}" for name, value in attributes.items())


def match_by_attributes(records: Sequence[ImageRecord], found: Mapping[str, Mapping[str, str]]) -> list[ImageRecord]:
    """Return the labelled images, with their combination of attributes for an identity."""
    return [
        replace(record, person_id=_name_combination(found[record.image_id]))
        for record in records
        if record.image_id in found
    ]


def load_attributes(source: Source, choices: Choices) -> Benchmark:
    """Every combination of ``attributes`` that the gallery has asks for the images that have it (paper section 3.3).

    An image's combination takes the place of its identity.

    Raises:
        DataError: no image has the attributes.
    """
    names, found = label_by_attributes(source, choices)
    gallery = match_by_attributes(source.gallery, found)
    combinations = {_name_combination(asked): asked for asked in found.values()}
    queries = [Query(key, key, attributes=asked) for key, asked in sorted(combinations.items())]
    variant = f"combinations of {', '.join(names)}, {len(gallery)} labelled images, {RULES['nothing']}"
    return Benchmark(source.name, variant, queries, gallery, source.image_root, "nothing")


DATASETS = {
    "pa100k": DataSet(list_pa100k),
    "peta": DataSet(list_peta),
    "rapv1": DataSet(list_rapv1),
    "rapv2": DataSet(list_rapv2),
}
BENCHMARKS = {"attributes": BenchmarkRules(load_attributes, queries_apart=False, asks_in_words=True)}

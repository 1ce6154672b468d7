"""Captions and attributes of a JSON Lines file are attached to the ImageRecords they describe."""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from ..errors import DataError
from ..records import ImageRecord
from ..shards import read_json_lines


# The last two are what `chatreid caption` writes: whether the clothing was seen, and who was asked.
KEYS = ("path", "person", "captions", "attributes", "clothing_recognised", "model")


def attach_annotations(records: list[ImageRecord], path: Path) -> tuple[list[ImageRecord], int]:
    """Return the records with captions and attributes from a JSON Lines file, and how many are occluded.

    An occluded training image, whose clothing was not recognised, has neither: Stage 1 leaves it out, as the paper
    does (section 3.2). Stages 2 and 3 ask who it is; infrared images show no clothing at all to many a model.

    A line is ``{"path": ..., "captions": [...], "attributes": {...}}``, where ``path`` is an image's path below the
    data set folder, or ``{"person": ...}`` with the identity as published, for all of a person's images. What an
    image's own line says replaces what its person's line says.

    Raises:
        DataError: a line is wrong, has an unknown key, names an image or person that the data set does not have, or
            one named before.
    """
    known = {
        "path": {record.path for record in records},
        "person": {_get_person(record) for record in records},
    }
    found: dict[str, dict[str, Mapping[str, Any]]] = {"path": {}, "person": {}}
    for number, line in read_json_lines(path):
        where = f"{path}, line {number}"
        _check_keys(line, where)
        key = "path" if "path" in line else "person"
        value = _read_name(line.get(key))
        if value not in known[key]:
            near = get_close_matches(value, known[key], 1, 0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{where}: the data set has no {key} {line.get(key)!r}.{hint}")
        if value in found[key]:
            raise DataError(f"{where}: {key} {value!r} was described before; write one line for it.")
        _check_line(line, where)
        found[key][value] = line

    described: list[ImageRecord] = []
    occluded = 0
    for record in records:
        line = {**found["person"].get(_get_person(record), {}), **found["path"].get(record.path, {})}
        if record.split == "train" and line.get("clothing_recognised") is False:
            line = {"captions": (), "attributes": {}}
            occluded += 1
        captions = tuple(line.get("captions", record.captions))
        described.append(replace(record, captions=captions, attributes=line.get("attributes", record.attributes)))
    return described, occluded


def _get_person(record: ImageRecord) -> str:
    return record.person_id.partition(":")[2]


def _read_name(value: object) -> str:
    """Return a path or identity; a number stands for its digits."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, str | int | None) and not isinstance(value, bool) else ""


def _check_keys(line: Mapping[str, Any], where: str) -> None:
    for key in line:
        if key not in KEYS:
            near = get_close_matches(key.lower(), KEYS, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise DataError(f"{where}: unknown key {key!r}.{hint} Keys are {', '.join(KEYS)}.")
    if ("path" in line) == ("person" in line):
        raise DataError(f"{where}: a line describes one image or one person: it needs either `path` or `person`.")


def _check_line(line: Mapping[str, Any], where: str) -> None:
    captions, attributes = line.get("captions", []), line.get("attributes", {})
    if not isinstance(captions, list) or not all(_is_text(caption) for caption in cast(list[Any], captions)):
        raise DataError(f"{where}: captions must be a list of texts that are not empty.")
    if not isinstance(attributes, dict) or not all(
        _is_text(value) for value in cast(dict[str, Any], attributes).values()
    ):
        raise DataError(f"{where}: attributes must be an object whose values are texts that are not empty.")
    if not isinstance(line.get("clothing_recognised", True), bool):
        raise DataError(f"{where}: clothing_recognised must be true or false.")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())

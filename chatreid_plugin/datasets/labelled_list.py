"""A user's own list of images: CSV or JSON Lines with a row for each image, or for each caption of one."""

import csv
import os
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..config import SourceSettings
from ..errors import ConfigError, DataError
from ..shards import read_json_lines, read_text
from .json_records import Record, get_label, get_path, get_texts
from .listing import Crop, Listing, check_files, check_folder
from .own_labels import FIELDS, assign_splits, make_crop


COLUMNS = ("path", *FIELDS, "caption")
_ADVICE = "Correct the row."
_EXAMPLE = "path,person,camera,split"
_CSV, _JSON_LINES = (".csv", ".tsv", ".txt"), (".jsonl", ".ndjson")
_SEPARATORS = ",;\t"


def list_labelled(source: SourceSettings) -> Listing:
    """List the images that the file ``source.labels`` names, each by its ``path`` below ``root`` and its ``person``.

    ``camera``, ``split``, ``clothes``, ``modality`` and ``caption`` are columns where they are known; ``own_labels``
    says what their values mean. Rows that name an image again add captions to it.

    Raises:
        ConfigError: no ``labels``, or queries are chosen in two ways.
        DataError: a row is wrong, or an image is missing.
    """
    if source.labels is None:
        raise ConfigError(f"Source {source.name} needs `labels`, a CSV or JSON Lines file with {_EXAMPLE}.")
    check_folder(source.root)
    listing = Listing(source.root)
    found: dict[str, tuple[Crop, str]] = {}
    labelled: set[bool] = set()
    for where, row in _read_rows(source.labels):
        labelled.add("split" in row)
        crop = _read_crop(listing, row, where)
        if crop is None:
            continue
        first, first_where = found.get(crop.path, (crop, where))
        if replace(crop, captions=()) != replace(first, captions=()):
            raise DataError(f"{where}: {crop.path} has other labels than in {first_where}. Correct one of the two.")
        captions = crop.captions if first is crop else first.captions + crop.captions
        found[crop.path] = replace(crop, captions=captions), first_where
    if len(labelled) > 1:
        raise DataError(f"{source.labels}: some rows have a split and some have none. Give all of them one, or none.")
    listing.crops = [crop for crop, _ in found.values()]
    if not listing.crops:
        raise DataError(f"{source.labels} names no image{' but junk (identity -1)' if listing.skipped else ''}.")
    check_files(listing, list(found))
    assign_splits(listing, source, labelled=True in labelled)
    return listing


def _read_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield (file and line, row); cells that are empty, as those of a missing camera, are left out."""
    if path.suffix.lower() in _JSON_LINES:
        rows = ((number, dict(row)) for number, row in read_json_lines(path))
    elif path.suffix.lower() in _CSV:
        rows = _read_csv(path)
    else:
        raise DataError(f"{path}: save the list as {', '.join(_CSV)} (CSV) or {', '.join(_JSON_LINES)} (JSON Lines).")
    for number, row in rows:
        where = f"{path}, line {number}"
        for key in row:
            if key not in COLUMNS:
                near = get_close_matches(key, COLUMNS, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise DataError(f"{where}: unknown column {key!r}.{hint} Columns are {', '.join(COLUMNS)}.")
        yield where, {key: value for key, value in row.items() if value not in (None, "") or key in ("path", "person")}


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = read_text(path).splitlines(keepends=True)
    # Excel separates by semicolons where the comma is the decimal sign.
    separator = max(_SEPARATORS, key=lines[0].count) if lines else ","
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if "path" not in header or len(set(header)) < len(header):
            raise DataError(f"{path}: the first line must name the columns, each once: {_EXAMPLE}, ...")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but {len(header)} columns. Put texts that "
                    f"hold {separator!r} in double quotes."
                )
            yield reader.line_num, {key: cell.strip() for key, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from None


def _read_crop(listing: Listing, row: Record, where: str) -> Crop | None:
    path = str(row.get("path", ""))
    root = os.path.abspath(listing.root)
    if os.path.isabs(path) and os.path.abspath(path).startswith(root + os.sep):
        row = {**row, "path": os.path.relpath(path, root)}
    labels = {key: get_label(row, key, where, _ADVICE) for key in FIELDS if key in row or key == "person"}
    captions = get_texts(row, "caption", where, _ADVICE) if "caption" in row else []
    return make_crop(listing, get_path(row, "path", where, _ADVICE), labels, where, captions)

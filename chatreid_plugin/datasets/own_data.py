"""A user's own images: a folder described by a pattern, or a CSV or JSON Lines list; and how any such set is measured.

``pattern`` is e.g. ``{person}/{camera}_{index}.png``; a list has a row for each image, or for each caption of one.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from ..config import SourceSettings
from ..errors import ConfigError, DataError
from ..records import Modality, Split
from ..shards import read_json_lines, read_text
from .benchmark import Benchmark, BenchmarkRules, Choices, Source
from .label_files import Record, get_label, get_path, get_texts
from .listing import (
    JUNK,
    JUNK_REASON,
    Crop,
    DataSet,
    Listing,
    check_files,
    check_folder,
    find_images,
    find_shared_people,
    keep_captions,
)


Value = TypeVar("Value")

FIELDS = ("person", "camera", "clothes", "modality", "split")
# As Market-1501 (bounding_box_*), VeRi-776 (image_*), SYSU-MM01 (probe) and others call theirs. A test set without
# queries is the gallery that queries are chosen from.
SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trainval", "train_set", "bounding_box_train", "image_train"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "val_set"), "val"),
    **dict.fromkeys(("query", "queries", "query_set", "test_query", "image_query", "probe", "probes"), "query"),
    **dict.fromkeys(("gallery", "gallery_set", "test_gallery", "test", "testing", "test_set"), "gallery"),
    **dict.fromkeys(("bounding_box_test", "image_test"), "gallery"),
}
MODALITY_NAMES: dict[str, Modality] = {
    **dict.fromkeys(("visible", "vis", "rgb", "color", "colour"), "visible"),
    **dict.fromkeys(("infrared", "ir", "nir", "thermal"), "infrared"),
}
# Fields that say nothing a record needs; so does every name that begins with _.
IGNORED = ("index", "image", "frame", "sequence", "time", "rest")
# What other code bases call the labels.
_SYNONYMS = {"pid": "person", "id": "person", "identity": "person", "cam": "camera", "camid": "camera", "set": "split"}
COLUMNS = ("path", *FIELDS, "caption")
_ADVICE = "Correct the row."
_EXAMPLE = "path,person,camera,split"
_CSV, _JSON_LINES = (".csv", ".tsv", ".txt"), (".jsonl", ".ndjson")
_SEPARATORS = ",;\t"


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern such as ``{person}/{camera}_{index}.png``.

    ``{person}`` is required; ``{camera}``, ``{clothes}``, ``{modality}`` and ``{split}`` are optional. The names in
    ``IGNORED``, and those that begin with ``_``, match and are ignored. A field takes the shortest text without a
    slash; everything else is literal.

    Raises:
        ConfigError: no ``{person}``, a field twice, an unknown one, or a brace that belongs to no field.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if any(brace in part for part in parts[::2] for brace in "{}"):
        raise ConfigError(f"Pattern {pattern!r}: a brace is open or too many; fields are written {{camera}}.")
    labels = [name for name in parts[1::2] if not _is_ignored(name)]
    unknown = [name for name in labels if name not in FIELDS]
    if unknown:
        raise ConfigError(f"Pattern {pattern!r}: unknown field {{{unknown[0]}}}.{_suggest(unknown[0])}")
    if "person" not in labels or len(set(labels)) != len(labels):
        raise ConfigError(f"Pattern {pattern!r} must name {{person}}, and each field once.")
    pieces = [
        re.escape(part) if place % 2 == 0 else "[^/]+?" if _is_ignored(part) else f"(?P<{part}>[^/]+?)"
        for place, part in enumerate(parts)
    ]
    return re.compile("".join(pieces))


def _is_ignored(name: str) -> bool:
    return name in IGNORED or name.startswith("_")


def _suggest(name: str) -> str:
    key = name.lower()
    near = [_SYNONYMS[key]] if key in _SYNONYMS else get_close_matches(key, [*FIELDS, *IGNORED], 1)
    hint = f" Did you mean {{{near[0]}}}?" if near else ""
    known = ", ".join(f"{{{field}}}" for field in FIELDS)
    ignored = ", ".join(f"{{{field}}}" for field in IGNORED)
    return f"{hint} Labels are {known}; ignored are {ignored}, and names that begin with _, such as {{_{name}}}."


def list_pattern(source: SourceSettings) -> Listing:
    """List any folder of crops by ``source.pattern``; ``make_crop`` says what its fields mean.

    Raises:
        ConfigError: the pattern is missing or wrong, or queries are chosen in two ways.
        DataError: missing folder, no file that matches, or an unknown split or modality.
    """
    if not source.pattern:
        raise ConfigError(f'Source {source.name} needs `pattern`, e.g. "{{person}}/{{camera}}_{{index}}.jpg".')
    expression = compile_pattern(source.pattern)
    check_folder(source.root)
    listing = Listing(source.root)
    example = ""
    for path in find_images(source.root, listing):
        relative = path.relative_to(source.root).as_posix()
        match = expression.fullmatch(relative)
        if not match:
            example = example or relative
            listing.skip("path does not match the pattern")
            continue
        crop = make_crop(listing, relative, match.groupdict(), str(path))
        if crop:
            listing.crops.append(crop)
    if not listing.crops:
        left_out = "; ".join(f"{count}: {reason}" for reason, count in listing.skipped.items())
        hint = f"For example {example!r} does not match. " if example else ""
        raise DataError(
            f"No file below {source.root} matches the pattern {source.pattern!r}. {hint}"
            + (f"Left out: {left_out}." if left_out else "It holds no image files.")
        )
    assign_splits(listing, source, labelled="split" in expression.groupindex)
    return listing


def list_labelled(source: SourceSettings) -> Listing:
    """List the images that the file ``source.labels`` names, each by its ``path`` below ``root`` and its ``person``.

    ``camera``, ``split``, ``clothes``, ``modality`` and ``caption`` are columns where they are known; ``make_crop``
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
    check_files(listing)
    assign_splits(listing, source, labelled=True in labelled)
    return listing


def _read_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield (file and line, row); cells that are empty, as those of a missing camera, are left out."""
    if path.suffix.lower() in _JSON_LINES:
        rows = ((number, dict(row)) for number, row in read_json_lines(path))
    elif path.suffix.lower() in _CSV:
        rows = read_csv(path)
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


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, row) of a list with a column ``path``; columns in lower case, separated by , ; or tab.

    Raises:
        DataError: no such column, or a row that does not fit.
    """
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


def make_crop(
    listing: Listing, path: str, labels: Mapping[str, str], where: str, captions: Sequence[str] = ()
) -> Crop | None:
    """Return an image with labels named as in ``FIELDS``, or None, and a count, for junk (identity -1).

    Without a camera the image counts as one of its own, so that nothing is ignored in evaluation.

    Args:
        listing: counts the junk.
        path: of the image, below the listing's root.
        labels: ``person`` and what else is known.
        where: names the place for messages.
        captions: sentences about the person.

    Raises:
        DataError: an unknown split or modality.
    """
    if labels["person"] == JUNK:
        listing.skip(JUNK_REASON)
        return None
    split = _look_up("split", labels.get("split", "train"), SPLIT_NAMES, where)
    return Crop(
        path=path,
        split=split,
        person=labels["person"],
        camera=labels.get("camera", path),
        clothes=labels.get("clothes"),
        modality=_look_up("modality", labels.get("modality", "visible"), MODALITY_NAMES, where),
        captions=keep_captions(listing, captions, split),
    )


def _look_up(field: str, text: str, names: Mapping[str, Value], where: str) -> Value:
    key = re.sub(r"[-\s]+", "_", text.strip().lower())
    if key not in names:
        near = get_close_matches(key, list(names), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(f"{where}: {field} {text!r} is unknown.{hint} Known: {', '.join(names)}.")
    return names[key]


def assign_splits(listing: Listing, source: SourceSettings, *, labelled: bool) -> None:
    """Give the listing's crops their splits and warn of what an evaluation would miss.

    If nothing labels the splits, the first ``train_share`` of the sorted identities trains and the rest is tested. Of
    the tested images (those labelled as gallery), the ones of ``query_cameras`` become queries, or the first
    ``queries_per_person`` by path, and the others are the gallery.

    Raises:
        ConfigError: queries are chosen in two ways.
    """
    has_queries = labelled and any(crop.split == "query" for crop in listing.crops)
    choices = [name for name in ("query_cameras", "queries_per_person") if getattr(source, name)]
    if len(choices) + has_queries > 1:
        ways = [*choices, "labels that say query"] if has_queries else choices
        raise ConfigError(f"Source {source.name} has {' and '.join(ways)}; set one of them.")
    if not labelled:
        _share_people(listing, source.train_share)
    elif "train_share" in source.model_fields_set:
        listing.warnings.append("train_share is not used: the labels say who trains")
    if choices:
        _choose_queries(listing, source)
    listing.warnings += [*_find_missing_splits(listing.crops, source), *find_shared_people(listing.crops)]


def _share_people(listing: Listing, share: float) -> None:
    people = sorted({crop.person for crop in listing.crops})
    training = set(people[: round(len(people) * share)])
    listing.crops = [replace(crop, split="train" if crop.person in training else "gallery") for crop in listing.crops]


def _choose_queries(listing: Listing, source: SourceSettings) -> None:
    asked: Counter[str] = Counter()
    crops: list[Crop] = []
    for crop in sorted(listing.crops, key=lambda crop: crop.path):
        first = asked[crop.person] < source.queries_per_person
        if crop.split == "gallery" and (crop.camera in source.query_cameras or first):
            asked[crop.person] += 1
            crop = replace(crop, split="query")
        crops.append(crop)
    listing.crops = crops


def _find_missing_splits(crops: Sequence[Crop], source: SourceSettings) -> list[str]:
    splits = {crop.split for crop in crops}
    cameras = sorted({crop.camera for crop in crops if crop.camera != crop.path})
    found = f"cameras found: {', '.join(cameras[:10])}"
    warnings: list[str] = []
    unknown = [camera for camera in source.query_cameras if camera not in cameras]
    if unknown:
        warnings.append(f"query_cameras names {', '.join(unknown)}, which no image has ({found})")
    if splits & {"query", "gallery"} and not {"query", "gallery"} <= splits:
        missing = "query" if "query" not in splits else "gallery"
        how = f"query_cameras ({found})" if cameras else "queries_per_person, e.g. 1,"
        warnings.append(f"no {missing} images: set {how} to evaluate")
    return warnings


def load_folder(source: Source, choices: Choices) -> Benchmark:
    """Any manifest with queries and a gallery; ``camera_rule: false`` ignores nothing."""
    return source.ask_with_images("single query", "same_camera" if choices.camera_rule else "nothing")


DATASETS = {
    "pattern": DataSet(list_pattern, keys=("pattern", "query_cameras", "queries_per_person")),
    "list": DataSet(list_labelled, keys=("labels", "query_cameras", "queries_per_person")),
}
BENCHMARKS = {"folder": BenchmarkRules(load_folder)}

"""What ``chatreid list`` shows: the catalog as a table, one entry whole, or JSON."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..config import SourceSettings
from ..errors import ConfigError
from ..records import Split
from .catalog import CatalogEntry, Count, read_catalog, refuse_withdrawn


SPLITS: tuple[Split, ...] = ("train", "val", "query", "gallery")
LEGEND = (
    "Counts: images/identities/captions as published, then V counted in the published files, P stated by the authors, "
    "K widely reported (differences only warn).\nOne entry whole: chatreid list NAME"
)


def render_catalog() -> str:
    """Return a table of all data sets; a set with variants has a line for each."""
    rows: list[tuple[str, ...]] = [("NAME", "TITLE", "SETTING", *(split.upper() for split in SPLITS), "USED FOR")]
    for name, entry in read_catalog().items():
        for variant in entry.variants or ("default",):
            shown = f"{name}:{variant}" if entry.variants else name
            counts = entry.counts.get(variant, {})
            cells = [_format_count(counts[split]) if split in counts else "-" for split in SPLITS]
            rows.append((shown, entry.title, entry.setting, *cells, entry.used_for))
    return f"{align_columns(rows)}\n\n{LEGEND}"


def render_entry(name: str) -> str:
    """Return everything about one data set.

    Raises:
        ConfigError: no such data set, or one that was withdrawn.
    """
    entry = find_entry(name)
    lines = [
        f"{simplify_name(name)}: {entry.title} ({entry.setting})",
        f"used for   {entry.used_for}",
        f"labels     {', '.join(('identity', *entry.labels))}",
        f"variants   {', '.join(entry.variants) or 'none'}"
        + (" (the first is the default)" if entry.variants else ""),
        f"file name  {entry.file_name}",
        "layout",
        *(f"  {line}" for line in entry.layout.rstrip().splitlines()),
        "counts",
        *(f"  {line}" for line in _list_counts(entry)),
        f"licence    {entry.licence}",
        f"ask at     {entry.source}",
    ]
    return "\n".join(lines)


def dump_catalog(name: str | None = None) -> str:
    """Return the catalog, or one entry of it, as JSON: name -> entry, or the entry with its ``name``.

    Raises:
        ConfigError: no such data set, or one that was withdrawn.
    """
    if name is None:
        value = {key: entry.model_dump(mode="json") for key, entry in read_catalog().items()}
    else:
        value = {"name": simplify_name(name), **find_entry(name).model_dump(mode="json")}
    return json.dumps(value, indent=2, ensure_ascii=False)


def simplify_name(name: str) -> str:
    """Return a data set's name as the catalog writes it: ``Market-1501`` -> ``market1501``."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_entry(name: str) -> CatalogEntry:
    """Return the entry of a data set, however its name is written (``Market-1501`` is ``market1501``).

    Raises:
        ConfigError: no such data set, or one that was withdrawn.
    """
    catalog = read_catalog()
    key = simplify_name(name)
    if key:
        refuse_withdrawn(SourceSettings(name=key, root=Path()))
    if key not in catalog:
        raise ConfigError(f"There is no data set {name!r}. `chatreid list` shows {', '.join(catalog)}.")
    return catalog[key]


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text with aligned columns, two spaces between them."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _format_count(count: Count) -> str:
    """``12,936/751 V``; what nobody says is a question mark, or left out at the end."""
    numbers = [count.images, count.identities, count.captions]
    while numbers and numbers[-1] is None:
        numbers.pop()
    return "/".join("?" if number is None else f"{number:,}" for number in numbers) + f" {count.confidence}"


def _list_counts(entry: CatalogEntry) -> list[str]:
    rows: list[tuple[str, ...]] = [("variant", "split", "images", "identities", "captions", "confidence")]
    for variant, counts in entry.counts.items():
        for split, count in counts.items():
            numbers = (count.images, count.identities, count.captions)
            cells = ("?" if number is None else f"{number:,}" for number in numbers)
            rows.append((variant, split, *cells, count.confidence))
    return align_columns(rows).splitlines() if len(rows) > 1 else ["none published"]

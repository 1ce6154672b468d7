"""Any folder of crops, described by a pattern such as ``{person}/{camera}_{index}.png``."""

import re
from difflib import get_close_matches

from ..config import SourceSettings
from ..errors import ConfigError, DataError
from .listing import Listing, check_folder
from .own_labels import FIELDS, assign_splits, make_crop
from .walking import find_images


# Fields that say nothing a record needs; so does every name that begins with _.
IGNORED = ("index", "image", "frame", "sequence", "time", "rest")
# What other code bases call the labels.
_SYNONYMS = {"pid": "person", "id": "person", "identity": "person", "cam": "camera", "camid": "camera", "set": "split"}


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
    """List any folder of crops by ``source.pattern``; ``own_labels`` says what its fields mean.

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

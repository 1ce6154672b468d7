"""Any folder of crops, described by a pattern such as ``{person}/{camera}_{index}.png``."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ...config import SourceSettings
from ...errors import ConfigError, DataError
from ...records import Split
from ..listing import Crop, Listing, check_folder
from ..walking import find_images


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern such as ``{person}/{camera}_{index}.png``.

    ``{person}`` is required; ``{camera}`` and ``{clothes}`` are optional; any other name matches and is ignored. A
    field takes the shortest text without a slash; everything else is literal.

    Raises:
        ConfigError: no ``{person}``, a field twice, or a brace that belongs to no field.
    """
    parts = re.split(r"\{([a-z_]+)\}", pattern)
    names = parts[1::2]
    if "person" not in names or len(set(names)) != len(names):
        raise ConfigError(f"Pattern {pattern!r} must name {{person}}, and each field once.")
    if any(brace in part for part in parts[::2] for brace in "{}"):
        raise ConfigError(f"Pattern {pattern!r}: field names are lower-case letters and _ in braces, e.g. {{camera}}.")
    pieces = [re.escape(part) if i % 2 == 0 else f"(?P<{part}>[^/]+?)" for i, part in enumerate(parts)]
    return re.compile("".join(pieces))


def assign_splits(crops: Sequence[Crop], source: SourceSettings) -> list[Crop]:
    """Return the crops with splits: the first ``train_share`` of the sorted identities trains, the rest is tested.

    Of the tested identities, images of ``query_cameras`` are queries, or the first ``queries_per_person`` by path, and
    the others the gallery.
    """
    people = sorted({crop.person for crop in crops})
    training = set(people[: round(len(people) * source.train_share)])
    asked: Counter[str] = Counter()
    splits: dict[str, Split] = {}
    for crop in sorted(crops, key=lambda crop: crop.path):
        splits[crop.path] = "train" if crop.person in training else "gallery"
        first = asked[crop.person] < source.queries_per_person
        if crop.person not in training and (crop.camera in source.query_cameras or first):
            splits[crop.path] = "query"
            asked[crop.person] += 1
    return [replace(crop, split=splits[crop.path]) for crop in crops]


def list_pattern(source: SourceSettings) -> Listing:
    """List any folder of crops by ``source.pattern``; identities are split by ``train_share``, so never shared.

    Without ``{camera}`` every image counts as a camera of its own, so that nothing is ignored in evaluation.

    Raises:
        ConfigError: the pattern is missing or wrong, or queries are chosen in two ways.
        DataError: missing folder, or no file that matches.
    """
    if not source.pattern:
        raise ConfigError(f'Source {source.name} needs `pattern`, e.g. "{{person}}/{{camera}}_{{index}}.jpg".')
    if source.query_cameras and source.queries_per_person:
        raise ConfigError(f"Source {source.name} has query_cameras and queries_per_person; set one of them.")
    check_folder(source.root)
    expression = compile_pattern(source.pattern)
    listing = Listing(source.root)
    example = ""
    for path in find_images(source.root, listing):
        relative = path.relative_to(source.root).as_posix()
        match = expression.fullmatch(relative)
        if not match:
            example = example or relative
            listing.skip("path does not match the pattern")
            continue
        fields = match.groupdict()
        camera = fields.get("camera", relative)
        listing.crops.append(Crop(relative, "train", fields["person"], camera, fields.get("clothes")))
    if not listing.crops:
        hint = f" For example {example!r} does not match." if example else " It holds no image files."
        raise DataError(f"No file below {source.root} matches the pattern {source.pattern!r}.{hint}")
    listing.crops = assign_splits(listing.crops, source)
    listing.warnings += _find_split_warnings(listing.crops, source)
    return listing


def _find_split_warnings(crops: Sequence[Crop], source: SourceSettings) -> list[str]:
    splits = {crop.split for crop in crops}
    cameras = sorted({crop.camera for crop in crops})
    found = f"cameras found: {', '.join(cameras[:10])}"
    warnings: list[str] = []
    unknown = [camera for camera in source.query_cameras if camera not in cameras]
    if unknown:
        warnings.append(f"query_cameras names {', '.join(unknown)}, which no image has ({found})")
    if splits - {"train"} and not {"query", "gallery"} <= splits:
        missing = "query" if "query" not in splits else "gallery"
        how = f"query_cameras ({found})" if "{camera}" in str(source.pattern) else "queries_per_person, e.g. 1,"
        warnings.append(f"no {missing} images: set {how} to evaluate")
    return warnings

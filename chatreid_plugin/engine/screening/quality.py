"""Leaves out training images that are too small, too blurred, too dark or copies of another, each for one reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...config import QualitySettings
from ...records import ImageRecord
from .hashing import Rows, find_close_pairs_within, find_first_equal, select_hashed


NEAR_DUPLICATE = "near_duplicate_bits"


@dataclass(frozen=True, slots=True)
class Drop:
    """One image that is left out.

    Attributes:
        record: the image.
        reason: the setting that it fails, e.g. ``min_width``.
        value: what was measured: pixels, ratio, sharpness, brightness, or the bits it differs in from the image it
            repeats.
    """

    record: ImageRecord
    reason: str
    value: float


@dataclass(frozen=True, slots=True)
class FilterResult:
    """The images that stay and those that go, both in the order in which they came."""

    kept: list[ImageRecord]
    dropped: list[Drop]


def filter_records(records: Sequence[ImageRecord], settings: QualitySettings) -> FilterResult:
    """Return which images stay; the first check that an image fails is its reason, in the order of the settings.

    An image is a near-duplicate if its hash differs in at most ``near_duplicate_bits`` from that of an earlier image
    that stays and shows the same identity. In a data set of which every identity has one image, an identity says
    nothing about who is shown (LUPerson-MLLM), so there an image is compared with all earlier ones. Flat pictures
    look alike whatever they show and are no duplicates; ``min_sharpness`` is for them.

    What was not measured passes: sharpness and brightness None, an empty hash, a width or height of 0.
    """
    drops: list[Drop | None] = [_find_fault(record, settings) for record in records]
    if settings.near_duplicate_bits is not None:
        sound = [row for row, drop in enumerate(drops) if drop is None]
        groups = _group_by_identity(records)[sound]
        copies = _find_copies([records[row] for row in sound], groups, settings.near_duplicate_bits)
        for index, bits in copies.items():
            drops[sound[index]] = Drop(records[sound[index]], NEAR_DUPLICATE, bits)
    return FilterResult(
        kept=[record for record, drop in zip(records, drops, strict=True) if drop is None],
        dropped=[drop for drop in drops if drop is not None],
    )


def _find_fault(record: ImageRecord, settings: QualitySettings) -> Drop | None:
    width, height = record.width or None, record.height or None
    aspect = height / width if width and height else None
    checks = (
        ("min_width", width, settings.min_width),
        ("min_height", height, settings.min_height),
        ("min_aspect", aspect, settings.min_aspect),
        ("max_aspect", aspect, settings.max_aspect),
        ("min_sharpness", record.sharpness, settings.min_sharpness),
        ("min_brightness", record.brightness, settings.min_brightness),
        ("max_brightness", record.brightness, settings.max_brightness),
    )
    for reason, value, limit in checks:
        if value is None or limit is None:
            continue
        if value < limit if reason.startswith("min_") else value > limit:
            return Drop(record, reason, value)
    return None


def _group_by_identity(records: Sequence[ImageRecord]) -> Rows:
    """Return a number for each record; those that may be copies of each other share it."""
    images = Counter(record.dataset for record in records)
    people = Counter(dataset for dataset, _ in {(record.dataset, record.person_id) for record in records})
    keys = [
        (record.dataset, "" if images[record.dataset] == people[record.dataset] else record.person_id)
        for record in records
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def _find_copies(records: Sequence[ImageRecord], groups: Rows, bits: int) -> dict[int, int]:
    """Return row -> distance to the nearest earlier image that stays, for each image that repeats one."""
    rows, words = select_hashed(records)
    groups = groups[rows]
    pairs = find_close_pairs_within(words, bits, groups)
    earlier: dict[int, list[tuple[int, int]]] = {}
    for left, right, distance in zip(pairs.left.tolist(), pairs.right.tolist(), pairs.distances.tolist(), strict=True):
        earlier.setdefault(right, []).append((distance, left))
    copies: dict[int, int] = {}
    for index, first in enumerate(find_first_equal(words, groups).tolist()):
        if first != index:
            # Whatever stands for the first of equal ones stands for the others: itself, or what it repeats.
            copies[index] = copies.get(first, 0)
            continue
        near = min((distance for distance, other in earlier.get(index, ()) if other not in copies), default=None)
        if near is not None:
            copies[index] = near
    return {int(rows[index]): distance for index, distance in copies.items()}

"""Which training images a stage trains on: those of people who are not held out, in some stages of good quality only.

``quality`` leaves out images that are too small, too blurred, too dark or copies of another, each for one reason.
``validation_share`` gives part of each source's people to data sets of their own; LLaMA-Factory's ``val_size`` holds
out records instead, and the people in those train in others.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import xxhash

from ...config import BuildSettings, QualitySettings
from ...errors import DataError
from ...printing import say
from ...records import ImageRecord
from ...shards import keep_records, list_records, pc
from .hashing import Rows, find_close_pairs_within, find_first_equal, select_hashed


NEAR_DUPLICATE = "near_duplicate_bits"
# Fewer have no negatives to draw.
FEWEST_PEOPLE = 2


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


@dataclass(frozen=True, slots=True)
class Part:
    """What one side is built from.

    Attributes:
        settings: the recipe; its records are those of this side.
        images: of each source that trains a stage.
        held_out: the side that is only evaluated on.
        stages: those that are built from these images.
    """

    settings: BuildSettings
    images: list[pa.Table]
    held_out: bool = False
    stages: tuple[int, ...] = (1, 2, 3)


def split_people(images: Sequence[pa.Table], settings: BuildSettings) -> list[Part]:
    """Return what trains and, with ``validation_share``, what is held out; no identity is in both.

    Who is held out depends on the seed and the identities alone. An identity is known by its name within a source:
    the same person in two sources under two names may be on both sides.

    Raises:
        DataError: a source has too few identities for two sides.
    """
    share = settings.validation_share
    if share == 0:
        return [Part(settings, list(images))]
    sides = [_split_source(table, settings) for table in images]
    fewer = {stage: max(1, round(count * share)) for stage, count in settings.records.items()}
    return [
        Part(settings, [training for training, _ in sides]),
        Part(settings.model_copy(update={"records": fewer}), [held_out for _, held_out in sides], held_out=True),
    ]


def _split_source(table: pa.Table, settings: BuildSettings) -> tuple[pa.Table, pa.Table]:
    people: list[str] = sorted(pc.unique(table["person_id"]).to_pylist())
    count = max(FEWEST_PEOPLE, round(settings.validation_share * len(people)))
    if len(people) - count < FEWEST_PEOPLE:
        raise DataError(
            f"validation_share: {settings.validation_share} would hold out {count} of the {len(people)} identities of "
            f"{people[0].partition(':')[0]}; training and validation need {FEWEST_PEOPLE} each. Set it to 0 or lower."
        )
    drawn = sorted(people, key=lambda person: xxhash.xxh3_64_intdigest(f"{settings.seed}/{person}".encode()))[:count]
    held_out = pc.is_in(table["person_id"], value_set=pa.array(drawn, table.schema.field("person_id").type))
    return table.filter(pc.invert(held_out)), table.filter(held_out)


def screen_part(part: Part) -> list[Part]:
    """Return a part for the stages that ``quality`` screens and one for the others, each with the images it trains.

    People are held out before, so that nobody trains in one stage and is held out in another.

    Raises:
        DataError: a source has no images left.
    """
    quality = part.settings.quality
    asked = sorted(int(name.removeprefix("stage")) for name in part.settings.records)
    screened = [stage for stage in asked if quality is not None and stage in quality.stages]
    others = [stage for stage in asked if stage not in screened]
    if not screened:
        return [part]
    parts = [replace(part, stages=tuple(screened), images=_screen(_list_trained(part, screened), part.settings))]
    return [*parts, replace(part, stages=tuple(others), images=_list_trained(part, others))] if others else parts


def _list_trained(part: Part, stages: Sequence[int]) -> list[pa.Table]:
    """Return the images of the sources that train one of the stages; all of them if none does, for the report."""
    trained = {source.name for source in part.settings.sources if set(source.stages) & set(stages)}
    return [table for table in part.images if table["dataset"][0].as_py() in trained] or part.images


def _screen(tables: Sequence[pa.Table], settings: BuildSettings) -> list[pa.Table]:
    return [keep_records(table, _filter_source(list_records(table), settings)) for table in tables]


def _filter_source(records: list[ImageRecord], settings: BuildSettings) -> list[ImageRecord]:
    assert settings.quality is not None
    result = filter_records(records, settings.quality)
    name = records[0].dataset
    for reason, count in Counter(drop.reason for drop in result.dropped).items():
        stages = " and ".join(map(str, settings.quality.stages))
        say(f"{name} left out of Stage {stages}: {count} (quality.{reason})", aside=True)
    if not result.kept:
        raise DataError(
            f"Source {name}: `quality` drops all {len(records)} training images. `chatreid filter CONFIG --dry-run` "
            "shows why."
        )
    return result.kept

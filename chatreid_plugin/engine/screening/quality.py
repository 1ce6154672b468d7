"""Which training images a stage trains on: those of people who are not held out, in some stages of good quality only.

``quality`` leaves out images that are too small, too blurred, too dark or copies of another, each for one reason.
``validation_share`` gives part of each source's people to data sets of their own; LLaMA-Factory's ``val_size`` holds
out records instead, and the people in those train in others.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from ...config import BuildSettings, QualitySettings
from ...errors import DataError
from ...printing import say
from ...shards import keep_rows, pc
from ..pool import encode, number
from .hashing import Rows, find_close_pairs_within, find_first_equal, select_hashed


NEAR_DUPLICATE = "near_duplicate_bits"
# Fewer have no negatives to draw.
FEWEST_PEOPLE = 2


class Drop(NamedTuple):
    """One image that is left out.

    Attributes:
        row: of the image.
        reason: the setting that it fails, e.g. ``min_width``.
        value: what was measured: pixels, ratio, sharpness, brightness, or the bits it differs in from the image it
            repeats.
    """

    row: int
    reason: str
    value: float


def find_drops(images: pa.Table, settings: QualitySettings) -> list[Drop]:
    """Return which images go, in their order, each for the first check that it fails, in the order of the settings.

    An image is a near-duplicate if its hash differs in at most ``near_duplicate_bits`` from that of an earlier image
    that stays and shows the same identity. In a data set of which every identity has one image, an identity says
    nothing about who is shown (LUPerson-MLLM), so there an image is compared with all earlier ones. Flat pictures
    look alike whatever they show and are no duplicates; ``min_sharpness`` is for them.

    What was not measured passes: sharpness and brightness null, an empty hash, a width or height of 0.
    """
    width, height = (pc.if_else(pc.greater(images[name], 0), images[name], None) for name in ("width", "height"))
    aspect = pc.divide(height.cast(pa.float64()), width.cast(pa.float64()))
    checks = {
        "min_width": width,
        "min_height": height,
        "min_aspect": aspect,
        "max_aspect": aspect,
        "min_sharpness": images["sharpness"],
        "min_brightness": images["brightness"],
        "max_brightness": images["brightness"],
    }
    drops: dict[int, Drop] = {}
    for reason, values in checks.items():
        limit = getattr(settings, reason)
        if limit is None:
            continue
        failing = pc.less(values, limit) if reason.startswith("min_") else pc.greater(values, limit)
        for row in np.flatnonzero(pc.fill_null(failing, False).to_numpy()).tolist():
            drops.setdefault(row, Drop(row, reason, values[row].as_py()))
    if settings.near_duplicate_bits is not None:
        sound = np.setdiff1d(np.arange(images.num_rows), list(drops))
        copies = _find_copies(images.take(sound), _group_by_identity(images)[sound], settings.near_duplicate_bits)
        drops |= {int(sound[row]): Drop(int(sound[row]), NEAR_DUPLICATE, bits) for row, bits in copies.items()}
    return [drops[row] for row in sorted(drops)]


def _group_by_identity(images: pa.Table) -> Rows:
    """Return a number for each image; those that may be copies of each other share it."""
    datasets, people = (encode(images[name].combine_chunks()) for name in ("dataset", "person_id"))
    owners = datasets[np.unique(number(datasets, people), return_index=True)[1]]
    single = np.bincount(datasets) == np.bincount(owners, minlength=datasets.max(initial=0) + 1)
    return number(datasets, np.where(single[datasets], -1, people))


def _find_copies(images: pa.Table, groups: Rows, bits: int) -> dict[int, int]:
    """Return row -> distance to the nearest earlier image that stays, for each image that repeats one."""
    rows, words = select_hashed(images)
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
    images = [_screen(table, part.settings) for table in _list_trained(part, screened)]
    parts = [replace(part, stages=tuple(screened), images=images)]
    return [*parts, replace(part, stages=tuple(others), images=_list_trained(part, others))] if others else parts


def _list_trained(part: Part, stages: Sequence[int]) -> list[pa.Table]:
    """Return the images of the sources that train one of the stages; all of them if none does, for the report."""
    trained = {source.name for source in part.settings.sources if set(source.stages) & set(stages)}
    return [table for table in part.images if table["dataset"][0].as_py() in trained] or part.images


def _screen(images: pa.Table, settings: BuildSettings) -> pa.Table:
    assert settings.quality is not None
    drops = find_drops(images, settings.quality)
    name = images["dataset"][0].as_py()
    for reason, count in Counter(drop.reason for drop in drops).items():
        stages = " and ".join(map(str, settings.quality.stages))
        say(f"{name} left out of Stage {stages}: {count} (quality.{reason})", aside=True)
    if len(drops) == images.num_rows:
        raise DataError(
            f"Source {name}: `quality` drops all {len(drops)} training images. `chatreid filter CONFIG --dry-run` "
            "shows why."
        )
    kept = np.ones(images.num_rows, dtype=bool)
    kept[[drop.row for drop in drops]] = False
    return keep_rows(images, pa.array(kept))

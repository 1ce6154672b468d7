"""Hold identities out of training: ``validation_share`` gives part of each source's people to data sets of their own.

LLaMA-Factory's ``val_size`` holds out records instead, and the people in those train in others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import xxhash

from ..config import BuildSettings
from ..errors import DataError
from .arrow_compute import pc


# Fewer have no negatives to draw.
FEWEST_PEOPLE = 2


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

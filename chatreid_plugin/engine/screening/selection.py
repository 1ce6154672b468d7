"""Which of the training images are trained on: those that no benchmark tests, in Stage 1 those of good quality."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from ...config import BuildSettings
from ...errors import DataError
from ...printing import say
from ...records import ImageRecord, convert_row_to_image_record
from ..arrow_compute import pc
from ..validation import Part
from .audit import TESTED_SPLITS, apply_leak_rule, read_tested_manifests
from .quality import filter_records


def drop_leaks(training: Sequence[pa.Table], tables: Sequence[pa.Table], settings: BuildSettings) -> list[pa.Table]:
    """Return the training images without those that leak from a test set.

    Args:
        training: training images of the sources that train a stage, tables of ``IMAGE_RECORD_SCHEMA``.
        tables: all images of all sources, for the tested ones among them.
        settings: the recipe.

    Raises:
        DataError: images leak and ``leaks`` is ``refuse``.
    """
    tested = [record for table in tables for record in _list_tested(table)]
    tested += read_tested_manifests(settings.audit_against)
    if not tested:
        return list(training)
    kept = apply_leak_rule([_list_records(table) for table in training], tested, settings)
    return [_keep(table, records) for table, records in zip(training, kept, strict=True)]


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
    return [_keep(table, _filter_source(_list_records(table), settings)) for table in tables]


def _list_tested(table: pa.Table) -> list[ImageRecord]:
    chosen = pc.is_in(table["split"], pa.array(TESTED_SPLITS))
    # Filtering looks at every row of the nested columns, even to find nothing.
    return _list_records(table.filter(chosen)) if pc.any(chosen).as_py() else []


def _list_records(table: pa.Table) -> list[ImageRecord]:
    return [convert_row_to_image_record(row) for row in table.to_pylist()]


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


def _keep(table: pa.Table, records: Sequence[ImageRecord]) -> pa.Table:
    if len(records) == table.num_rows:
        return table
    ids = pa.array([record.image_id for record in records], pa.string())
    return table.filter(pc.is_in(table["image_id"], ids))

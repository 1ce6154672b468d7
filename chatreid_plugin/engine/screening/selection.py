"""Which of the training images are trained on: those of good quality that no benchmark tests."""

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from ...config import BuildSettings
from ...errors import DataError
from ...printing import say
from ...records import ImageRecord, convert_row_to_image_record
from ..arrow_compute import pc
from .audit import TESTED_SPLITS, apply_leak_rule, read_tested_manifests
from .quality import filter_records


def select_training(
    training: Sequence[pa.Table], tables: Sequence[pa.Table], settings: BuildSettings
) -> list[pa.Table]:
    """Return the training images without those that ``quality`` drops or that leak from a test set.

    Args:
        training: training images of the sources that train a stage, tables of ``IMAGE_RECORD_SCHEMA``.
        tables: all images of all sources, for the tested ones among them.
        settings: the recipe.

    Raises:
        DataError: images leak and ``leaks`` is ``refuse``; or a source has no images left.
    """
    tested = [record for table in tables for record in _list_tested(table)]
    tested += read_tested_manifests(settings.audit_against)
    if settings.quality is None and not tested:
        return list(training)
    kept = [_list_records(table) for table in training]
    if settings.quality is not None:
        kept = [_filter_source(records, settings) for records in kept]
    if tested:
        kept = apply_leak_rule(kept, tested, settings)
    return [_keep(table, records) for table, records in zip(training, kept, strict=True)]


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
        say(f"{name} left out: {count} (quality.{reason})", aside=True)
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

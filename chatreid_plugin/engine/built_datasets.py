"""Built data sets as they lie on disk: which there are, and any record of them without reading whole shards.

After ``build``: what ``chatreid show`` and ``chatreid stats`` look at. ``dataset_info.json`` names the data sets, the
footers of the shards count their records, and ``<name>.json`` beside each folder holds the recipe.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..config import BuildSettings
from ..errors import DataError
from ..records import Instruction, convert_row_to_instruction
from ..shards import DATASET_INFO, HELD_OUT, check_shard, open_parquet, read_json
from ..tasks import Task, get_task


FORMATTING = "chatreid"


@dataclass(frozen=True, slots=True)
class BuiltDataset:
    """One data set of ``dataset_info.json``.

    Attributes:
        name: as in ``dataset_info.json``.
        task: of all its records.
        stage: the one that trains it.
        image_root: the folder that the records' image paths are relative to.
        shards: its Parquet files in reading order.
        sizes: records of each shard.
        provenance: the JSON file that ``build`` writes beside the folder.
        own_prompts: the user's wordings of the task.
    """

    name: str
    task: Task
    stage: int
    image_root: Path
    shards: tuple[Path, ...]
    sizes: tuple[int, ...]
    provenance: Path
    own_prompts: tuple[str, ...] = ()

    @property
    def held_out(self) -> bool:
        """Whether its identities train no record."""
        return self.name.endswith(HELD_OUT)

    @property
    def records(self) -> int:
        """Number of records in all shards."""
        return sum(self.sizes)


def _read_entries(dataset_dir: Path) -> dict[str, Any]:
    """Return the data sets of our format that ``dataset_info.json`` names."""
    path = dataset_dir / DATASET_INFO
    if not path.is_file():
        raise DataError(
            f"{dataset_dir} is no folder of built data sets: it has no {DATASET_INFO}. Name the output_dir of "
            "`chatreid build`."
        )
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise DataError(f"{path} is not a JSON object of data sets. Build them with `chatreid build`.")
    return {name: e for name, e in entries.items() if isinstance(e, dict) and e.get("formatting") == FORMATTING}


def _open_dataset(dataset_dir: Path, name: str, entry: dict[str, Any]) -> BuiltDataset | None:
    """Return a data set, or None if nothing of it is there."""
    try:
        folder = dataset_dir / entry.get("file_name", name)
        block = entry.get("chatreid") or {}
        root = (dataset_dir.resolve() / block.get("image_root", "")).resolve()
        own_prompts = tuple(map(str, block.get("prompts", ())))
        stage = None if block.get("stage") is None else int(block["stage"])
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"{dataset_dir / DATASET_INFO}: the entry {name} is damaged ({error}). Build it with `chatreid build`."
        ) from None
    shards = tuple(sorted(folder.glob("*.parquet")))
    sizes = tuple(check_shard(shard) for shard in shards)
    filled = next((shard for shard, size in zip(shards, sizes, strict=True) if size), None)
    if filled is None:
        return None
    (first,) = _read_rows(filled, 0, 1)
    task = get_task(first.task, first.id)
    # Data sets of earlier versions do not say it; theirs is the task's first.
    stage = task.stages[0] if stage is None else stage
    return BuiltDataset(name, task, stage, root, shards, sizes, dataset_dir / f"{name}.json", own_prompts)


def list_datasets(dataset_dir: Path, wanted: str | None = None) -> list[BuiltDataset]:
    """Return the data sets of a folder that have records, in the order of ``dataset_info.json``.

    Args:
        dataset_dir: the ``output_dir`` of ``chatreid build``, LLaMA-Factory's ``dataset_dir``.
        wanted: only those of this name or task.

    Raises:
        DataError: the folder holds no built data set, none of this name or task, or a damaged one.
    """
    opened = (_open_dataset(dataset_dir, name, entry) for name, entry in _read_entries(dataset_dir).items())
    datasets = [dataset for dataset in opened if dataset is not None]
    if not datasets:
        raise DataError(f"{dataset_dir} holds no built data set. Build some with `chatreid build`.")
    found = [dataset for dataset in datasets if wanted in (None, dataset.name, dataset.task.name)]
    if not found:
        known = ", ".join(dataset.name for dataset in datasets)
        raise DataError(f"{dataset_dir} holds no data set or task {wanted!r}; there are: {known}.")
    return found


def read_build_settings(dataset: BuiltDataset) -> BuildSettings:
    """Return the recipe that a data set was built from.

    Raises:
        DataError: there is no provenance, it is not one that this version can read, or the build has not ended.
    """
    provenance = read_json(dataset.provenance)
    try:
        settings, complete = BuildSettings.model_validate(provenance["settings"]), provenance["complete"]
    except (TypeError, KeyError, ValidationError) as error:
        raise DataError(
            f"{dataset.provenance} holds no recipe that this version understands ({error}). "
            "Build the data set again with `chatreid build`."
        ) from None
    if not complete:
        raise DataError(
            f"{dataset.provenance}: the data set is not complete. Run `chatreid build` again to finish it."
        )
    return settings


def read_records(dataset: BuiltDataset, start: int, count: int) -> list[Instruction]:
    """Return up to ``count`` records from number ``start`` (0-based); only their row groups are read.

    Raises:
        DataError: the data set has no record of this number, or a shard is damaged.
    """
    if not 0 <= start < dataset.records:
        raise DataError(
            f"{dataset.name} has no record number {start}: it has {dataset.records:,} (0 to {dataset.records - 1})."
        )
    records: list[Instruction] = []
    for shard, first, last in _list_ranges(dataset.sizes, start, start + count):
        records += _read_rows(dataset.shards[shard], first, last)
    return records


def _list_ranges(sizes: tuple[int, ...], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (part, first row, row after the last one) of each part that overlaps rows ``start`` to ``end``."""
    offsets = [0, *accumulate(sizes)]
    for part, size in enumerate(sizes):
        first, last = max(start - offsets[part], 0), min(end - offsets[part], size)
        if first < last:
            yield part, first, last


def _read_rows(path: Path, first: int, last: int) -> list[Instruction]:
    rows: list[dict[str, Any]] = []
    with open_parquet(path) as file:
        groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))
        for group, begin, end in _list_ranges(groups, first, last):
            rows += file.read_row_group(group).slice(begin, end - begin).to_pylist()
    return [convert_row_to_instruction(row) for row in rows]

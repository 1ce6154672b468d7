"""Run the data engine: sources -> manifests -> shards of every stage -> dataset_info.json."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from .. import __version__
from ..config import BuildSettings
from ..errors import DataError
from ..images import ImagePolicy
from ..records import INSTRUCTION_SCHEMA, ImageRecord, convert_instruction_to_row
from ..shards import check_shard, read_json, write_json, write_shard
from ..tasks import TASKS, list_stage_tasks
from .builders import build_record, explain_missing
from .sampler import ImagePool
from .sources import read_training_records


DATASET_INFO = "dataset_info.json"


@dataclass(slots=True)
class BuildReport:
    """What was (or would be) built.

    Attributes:
        datasets: data set name -> number of records.
        skipped: data set name -> why there are no records of it.
        output_dir: the folder for LLaMA-Factory's ``dataset_dir``.
        reused: data sets that were already there, from the same settings.
    """

    output_dir: Path
    datasets: dict[str, int] = field(default_factory=dict[str, int])
    skipped: dict[str, str] = field(default_factory=dict[str, str])
    reused: list[str] = field(default_factory=list[str])

    def render(self) -> str:
        """Return the report as text."""
        lines = [f"{name:<48}{count:>12,} records" for name, count in self.datasets.items()]
        lines += [f"{name:<48}{'left out':>12}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([*lines, f"dataset_dir: {self.output_dir}"])

    def to_json(self) -> str:
        """Return the report as JSON."""
        values = {
            "output_dir": str(self.output_dir),
            "datasets": self.datasets,
            "skipped": self.skipped,
            "reused": self.reused,
        }
        return json.dumps(values, indent=2, ensure_ascii=False)


def share_out(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Return ``total`` shared out by weight, so that the parts add up to it (largest remainders round up)."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    parts = {name: int(value) for name, value in exact.items()}
    # Ties go to the first, since the sort is stable.
    by_remainder = sorted(exact, key=lambda name: parts[name] - exact[name])
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def plan_datasets(settings: BuildSettings, pools: dict[int, list[ImagePool]], report: BuildReport) -> dict[str, int]:
    """Return task name -> number of records; tasks without records are noted in the report.

    Stage 2's ratios are rescaled over the tasks that remain.
    """
    plan: dict[str, int] = {}
    for stage_name, total in settings.records.items():
        stage = int(stage_name.removeprefix("stage"))
        weights: dict[str, float] = {}
        for task in list_stage_tasks(stage):
            reasons = {explain_missing(task.name, pool) for pool in pools[stage]}
            weight = settings.stage2_ratios.get(task.name, 0.0) if stage == 2 else 1.0
            if weight == 0:
                reasons = {"no share in stage2_ratios"}
            if None in reasons:
                weights[task.name] = weight
            else:
                report.skipped[name_dataset(task.name)] = ", ".join(sorted(str(r) for r in reasons))
        for name, count in share_out(total, weights).items():
            if count:
                plan[name] = count
            else:
                report.skipped[name_dataset(name)] = f"its share of {total} records is less than one"
    return plan


def name_dataset(task: str) -> str:
    """Return the name of a task's data set."""
    return f"chatreid_stage{TASKS[task].stage}_{task}"


def iterate_shard(
    task: str, pools: list[ImagePool], settings: BuildSettings, name: str, shard: int, count: int
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one shard; they depend on the settings, the data and the shard's number alone."""
    rng = np.random.default_rng([settings.seed, xxhash.xxh32_intdigest(name.encode()), shard])
    usable = [pool for pool in pools if explain_missing(task, pool) is None]
    weights = np.array([len(pool.records) for pool in usable], dtype=np.float64)
    bounds = np.cumsum(weights / weights.sum())
    first = shard * settings.records_per_shard
    for number in range(first, first + count):
        pool = usable[min(int(np.searchsorted(bounds, rng.random())), len(usable) - 1)]
        yield convert_instruction_to_row(build_record(task, pool, rng, settings, f"{name}-{number:010d}"))


def _is_complete(path: Path, size: int) -> bool:
    """Return whether a shard is there and whole; one that is cut short is built again."""
    try:
        return path.is_file() and check_shard(path) == size
    except DataError:
        return False


def _write_dataset(task: str, pools: list[ImagePool], settings: BuildSettings, name: str, count: int) -> int:
    """Write the shards that are missing; return how many there were."""
    written = 0
    with tqdm(total=count, desc=name, unit="record") as progress:
        for shard, first in enumerate(range(0, count, settings.records_per_shard)):
            size = min(settings.records_per_shard, count - first)
            path = settings.output_dir / name / f"{shard:05d}.parquet"
            if not _is_complete(path, size):
                rows = list(iterate_shard(task, pools, settings, name, shard, size))
                write_shard(path, rows, INSTRUCTION_SCHEMA)
                written += 1
            progress.update(size)
    return written


def digest_records(records: list[list[ImageRecord]]) -> str:
    """Return a hash over the image records of all sources; it serves every data set built from them."""
    digest = xxhash.xxh3_128()
    for source in records:
        for record in source:
            digest.update(repr(record).encode())
    return digest.hexdigest()


def compute_fingerprint(settings: BuildSettings, task: str, count: int, records_digest: str) -> str:
    """Return a hash over everything a data set's bytes depend on, the image records included."""
    # The number of wordings, not their text: records hold the variant's number, so prompts may be edited afterwards.
    digest = xxhash.xxh3_128(repr((__version__, task, len(TASKS[task].prompts), count)).encode())
    digest.update(repr((settings.gallery, settings.prompt_variants, settings.cutoff_len)).encode())
    digest.update(repr((settings.records_per_shard, settings.seed, records_digest)).encode())
    return digest.hexdigest()


def _prepare_folder(settings: BuildSettings, name: str, fingerprint: str, overwrite: bool) -> None:
    """Clear or refuse what other settings left in a data set's folder."""
    provenance = settings.output_dir / f"{name}.json"
    folder = settings.output_dir / name
    if not provenance.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} exists but was not built here (no {provenance.name}). Move it away.")
        return
    if read_json(provenance).get("fingerprint") == fingerprint:
        return
    if not overwrite:
        raise DataError(
            f"{folder} was built from other settings or images, or by another version. Use --overwrite to build it "
            "again, or another output_dir."
        )
    for path in folder.glob("*.parquet"):
        path.unlink()
    # Last: killed before this, the next run still knows the shards for another recipe's.
    provenance.unlink()


def _build_dataset(
    task: str, count: int, settings: BuildSettings, pools: list[ImagePool], fingerprint: str, overwrite: bool
) -> bool:
    """Write one data set with its provenance; return whether all of it was there before."""
    name = name_dataset(task)
    _prepare_folder(settings, name, fingerprint, overwrite)
    provenance = settings.output_dir / f"{name}.json"
    values = {
        "fingerprint": fingerprint,
        "version": __version__,
        "settings": settings.model_dump(mode="json"),
        "records": count,
    }
    if not provenance.is_file():
        write_json(provenance, {**values, "complete": False})
    written = _write_dataset(task, pools, settings, name, count)
    if written or not read_json(provenance).get("complete"):
        write_json(provenance, {**values, "complete": True})
    return not written


def build_datasets(settings: BuildSettings, dry_run: bool = False, overwrite: bool = False) -> BuildReport:
    """Build one data set per task and enter it in ``dataset_info.json``; finished shards of a killed run are kept.

    Args:
        settings: the recipe.
        dry_run: only say what would be built; nothing is written, not even a manifest.
        overwrite: replace data sets that were built from other settings.

    Raises:
        DataError: sources are missing or wrong, or a data set of other settings is in the way.
    """
    records, root = read_training_records(settings, write=not dry_run)
    stages = sorted(int(name.removeprefix("stage")) for name in settings.records)
    indexed = [ImagePool(source, ImagePolicy(stages[0])) for source in records]
    pools = {stage: [pool.count_under(ImagePolicy(stage)) for pool in indexed] for stage in stages}
    report = BuildReport(settings.output_dir)
    plan = plan_datasets(settings, pools, report)
    if not plan:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.skipped.items())
        raise DataError(f"Nothing can be built. {reasons}.")
    records_digest = digest_records(records)
    for task, count in plan.items():
        name = name_dataset(task)
        report.datasets[name] = count
        if dry_run:
            continue
        fingerprint = compute_fingerprint(settings, task, count, records_digest)
        if _build_dataset(task, count, settings, pools[TASKS[task].stage], fingerprint, overwrite):
            report.reused.append(name)
        enter_dataset(settings.output_dir, name, root)
    return report


def enter_dataset(output_dir: Path, name: str, image_root: Path) -> None:
    """Enter a data set in ``dataset_info.json`` (LLaMA-Factory's file), other entries untouched."""
    path = output_dir / DATASET_INFO
    entries: Any = read_json(path) if path.is_file() else {}
    if not isinstance(entries, dict):
        raise DataError(f"{path} is not a JSON object of data sets. Move it away.")
    relative = Path(os.path.relpath(image_root, output_dir.resolve())).as_posix()
    entries[name] = {"file_name": name, "formatting": "chatreid", "chatreid": {"image_root": relative}}
    write_json(path, entries)

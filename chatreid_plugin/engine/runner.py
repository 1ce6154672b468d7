"""Run the data engine: sources -> manifests -> shards of every stage -> dataset_info.json."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
from ..shards import check_shard, read_json, read_manifest, write_json, write_manifest, write_shard
from ..tasks import TASKS, list_stage_tasks
from .builders import build_record, explain_missing
from .parsers import ParseReport, parse_source
from .sampler import ImagePool


DATASET_INFO = "dataset_info.json"


@dataclass(slots=True)
class BuildReport:
    """What was (or would be) built.

    Attributes:
        datasets: data set name -> number of records.
        skipped: task name -> why there are no records of it.
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

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "output_dir": str(self.output_dir),
            "datasets": self.datasets,
            "skipped": self.skipped,
            "reused": self.reused,
        }


def describe_parse(name: str, report: ParseReport) -> str:
    """Return one line per split and reason for the user."""
    lines: list[str] = []
    for split in ("train", "query", "gallery"):
        records = [record for record in report.records if record.split == split]
        people = len({record.person_id for record in records})
        cameras = len({record.camera_id for record in records})
        lines.append(f"{name} {split}: {len(records)} images, {people} identities, {cameras} cameras")
    lines += [f"{name} left out: {count} ({reason})" for reason, count in sorted(report.skipped.items())]
    lines += [f"{name} warning: {warning}" for warning in report.warnings]
    return "\n".join(lines)


def find_manifest(settings: BuildSettings, name: str) -> Path:
    """Return where the manifest of a source is kept."""
    return settings.manifest_dir / f"{name}.parquet"


def parse_sources(settings: BuildSettings) -> list[Path]:
    """Parse every source into a manifest (Parquet of ImageRecords, provenance beside it) and say what was found.

    Raises:
        DataError: a folder, file or caption line is missing or wrong.
    """
    paths: list[Path] = []
    for source in settings.sources:
        report = parse_source(source)
        print(describe_parse(source.name, report), file=sys.stderr)
        root = source.root
        if report.records and not (root / report.records[0].path).is_file():
            root = root / "Market-1501-v15.09.15"
        path = find_manifest(settings, source.name)
        provenance = {
            "source": source.model_dump(mode="json"),
            "version": __version__,
            "skipped": report.skipped,
            "warnings": report.warnings,
        }
        write_manifest(path, report.records, root, provenance)
        paths.append(path)
    return paths


def _read_training_records(settings: BuildSettings) -> tuple[list[list[ImageRecord]], Path]:
    """Return the training images of each source, with paths relative to the folder that all sources share."""
    found: list[tuple[list[ImageRecord], Path]] = []
    for source in settings.sources:
        path = find_manifest(settings, source.name)
        if not path.is_file():
            parse_sources(settings.model_copy(update={"sources": (source,)}))
        records, root = read_manifest(path)
        training = [record for record in records if record.split == "train"]
        if not training:
            raise DataError(f"{path} has no training images; raise train_share of source {source.name}.")
        found.append((training, root))
    common = Path(os.path.commonpath([root for _, root in found]))
    moved = [
        [replace(r, path=(root.relative_to(common) / r.path).as_posix()) for r in records] for records, root in found
    ]
    return moved, common


def plan_datasets(settings: BuildSettings, pools: dict[int, list[ImagePool]], report: BuildReport) -> dict[str, int]:
    """Return task name -> number of records; tasks that no source can give are noted in the report.

    Stage 2's ratios are rescaled over the tasks that remain.
    """
    plan: dict[str, int] = {}
    for stage_name, total in settings.records.items():
        stage = int(stage_name.removeprefix("stage"))
        weights: dict[str, float] = {}
        for task in list_stage_tasks(stage):
            reasons = {explain_missing(task.name, pool) for pool in pools[stage]}
            weight = settings.stage2_ratios.get(task.name, 0.0) if stage == 2 else 1.0
            if None in reasons and weight > 0:
                weights[task.name] = weight
            elif weight > 0:
                report.skipped[f"chatreid_stage{stage}_{task.name}"] = ", ".join(sorted(str(r) for r in reasons))
        for name, weight in weights.items():
            plan[name] = round(total * weight / sum(weights.values()))
    return {name: count for name, count in plan.items() if count > 0}


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


def _write_dataset(task: str, pools: list[ImagePool], settings: BuildSettings, name: str, count: int) -> None:
    folder = settings.output_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-count // settings.records_per_shard)
    with tqdm(total=count, desc=name, unit="record") as progress:
        for shard in range(shards):
            size = min(settings.records_per_shard, count - shard * settings.records_per_shard)
            path = folder / f"{shard:05d}.parquet"
            if not (path.is_file() and check_shard(path) == size):
                rows = list(iterate_shard(task, pools, settings, name, shard, size))
                write_shard(path, rows, INSTRUCTION_SCHEMA)
            progress.update(size)


def compute_fingerprint(settings: BuildSettings, task: str, count: int, records: list[list[ImageRecord]]) -> str:
    """Return a hash over everything a data set's bytes depend on, the image records included."""
    digest = xxhash.xxh3_128(f"{__version__} {TASKS[task]} {count}".encode())
    digest.update(repr((settings.gallery, settings.prompt_variants, settings.cutoff_len)).encode())
    digest.update(repr((settings.records_per_shard, settings.seed)).encode())
    for source in records:
        for record in source:
            digest.update(repr(record).encode())
    return digest.hexdigest()


def _prepare_folder(settings: BuildSettings, name: str, fingerprint: str, overwrite: bool) -> bool:
    """Return whether the data set is already complete; clear or refuse leftovers of other settings."""
    provenance = settings.output_dir / f"{name}.json"
    folder = settings.output_dir / name
    if not provenance.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} exists but was not built here (no {provenance.name}). Move it away.")
        return False
    found = read_json(provenance)
    if found.get("fingerprint") != fingerprint:
        if not overwrite:
            raise DataError(
                f"{folder} was built from other settings or images. Use --overwrite to build it again, or another "
                "output_dir."
            )
        for path in folder.glob("*.parquet"):
            path.unlink()
        return False
    return bool(found.get("complete"))


def build_datasets(settings: BuildSettings, dry_run: bool = False, overwrite: bool = False) -> BuildReport:
    """Build one data set per task and enter it in ``dataset_info.json``; finished shards of a killed run are kept.

    Args:
        settings: the recipe.
        dry_run: only say what would be built; sources are parsed if their manifest is missing.
        overwrite: replace data sets that were built from other settings.

    Raises:
        DataError: sources are missing or wrong, or a data set of other settings is in the way.
    """
    records, root = _read_training_records(settings)
    stages = sorted(int(name.removeprefix("stage")) for name in settings.records)
    pools = {stage: [ImagePool(source, ImagePolicy(stage)) for source in records] for stage in stages}
    report = BuildReport(settings.output_dir)
    plan = plan_datasets(settings, pools, report)
    if not plan:
        raise DataError(f"Nothing can be built: {report.skipped}.")
    for task, count in plan.items():
        stage = TASKS[task].stage
        name = f"chatreid_stage{stage}_{task}"
        report.datasets[name] = count
        if dry_run:
            continue
        fingerprint = compute_fingerprint(settings, task, count, records)
        provenance = settings.output_dir / f"{name}.json"
        if _prepare_folder(settings, name, fingerprint, overwrite):
            report.reused.append(name)
        else:
            origin = {"fingerprint": fingerprint, "version": __version__, "settings": settings.model_dump(mode="json")}
            write_json(provenance, origin | {"records": count, "complete": False})
            _write_dataset(task, pools[stage], settings, name, count)
            write_json(provenance, origin | {"records": count, "complete": True})
        enter_dataset(settings.output_dir, name, root)
    return report


def enter_dataset(output_dir: Path, name: str, image_root: Path) -> None:
    """Enter a data set in ``dataset_info.json`` (LLaMA-Factory's file), other entries untouched."""
    path = output_dir / DATASET_INFO
    entries: dict[str, Any] = read_json(path) if path.is_file() else {}
    relative = Path(os.path.relpath(image_root, output_dir.resolve())).as_posix()
    entries[name] = {"file_name": name, "formatting": "chatreid", "chatreid": {"image_root": relative}}
    write_json(path, entries)

"""Run the data engine: sources -> manifests -> shards of every stage -> dataset_info.json.

First which data sets are built, with how many records each, and what stands against it; then ``build_datasets``.
"""

import json
import os
import platform
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from tqdm import tqdm

from .. import __version__
from ..config import BuildSettings
from ..errors import ConfigError, DataError
from ..locks import hold_folder, make_folder, try_folder
from ..shards import DATASET_INFO, FORMATTING, HELD_OUT, LEFT_OUT, check_shard, read_json, write_json
from ..tasks import list_stage_tasks
from .builders import explain_missing
from .executors import ShardJob, choose_changes, choose_pools, index_sources, list_variants, open_workers, run_jobs
from .look_alikes import (
    STAGES_WITH_NEGATIVES,
    FeatureFile,
    add_look_alikes,
    check_feature_files,
    combine_digests,
    find_feature_files,
)
from .manifests import read_training_images
from .pool import ImageTable, combine_images, digest_images, write_image_table
from .sampler import ImagePool
from .screening.quality import Part, screen_part, split_people


@dataclass(slots=True)
class BuildReport:
    """What was (or would be) built.

    Attributes:
        datasets: data set name -> number of records.
        skipped: data set name -> why there are no records of it.
        output_dir: the folder for LLaMA-Factory's ``dataset_dir``.
        reused: data sets that were already there, from the same settings.
        written: records that this run wrote.
        seconds: how long drawing and writing them took.
    """

    output_dir: Path
    datasets: dict[str, int] = field(default_factory=dict[str, int])
    skipped: dict[str, str] = field(default_factory=dict[str, str])
    reused: list[str] = field(default_factory=list[str])
    written: int = 0
    seconds: float = 0.0

    def render(self) -> str:
        """Return the report as text; of what was built, with the commands that train it."""
        lines = [f"{name:<48}{count:>12,} records" for name, count in self.datasets.items()]
        lines += [f"{name:<48}{'left out':>12}: {reason}" for name, reason in self.skipped.items()]
        if self.written:
            rate = self.written / max(self.seconds, 1e-9)
            lines.append(f"{self.written:,} records written in {self.seconds:.1f} s ({rate:,.0f} records/s)")
        lines.append(f"dataset_dir: {self.output_dir}")
        commands = list_training_commands(self)
        if commands and (self.written or self.reused):
            lines += [*self._advise_left_out(), "Next (on one GPU without FORCE_TORCHRUN=1 and with deepspeed=null):"]
            lines += [f"  {command}" for command in commands]
        return "\n".join(lines)

    def _advise_left_out(self) -> list[str]:
        """Return what to do about the tasks that need captions or attributes, if some were left out for them."""
        if not any("no captions" in reason or "no attributes" in reason for reason in self.skipped.values()):
            return []
        return [
            "Tasks without captions or attributes are left out. To train them, write a `captions` file or have one "
            "written (chatreid caption), name it in the recipe's source and build again with --overwrite."
        ]

    def to_json(self) -> str:
        """Return the report as JSON."""
        values = {
            "output_dir": str(self.output_dir),
            "datasets": self.datasets,
            "skipped": self.skipped,
            "reused": self.reused,
            "written": self.written,
            "seconds": round(self.seconds, 3),
        }
        return json.dumps(values, indent=2, ensure_ascii=False)


def name_dataset(task: str, stage: int, held_out: bool = False) -> str:
    """Return the name of the data set of a task that a stage trains, or of the one that training never sees."""
    return f"chatreid_stage{stage}_{task}{HELD_OUT if held_out else ''}"


def list_training_commands(report: BuildReport) -> list[str]:
    """Return the command of each stage that has records, with what it needs beside the shipped recipe.

    Without records of Stage 1, Stage 2 keeps the model's own encoder. A stage's name stands for all data sets of it.
    """
    commands: list[str] = []
    for stage in (1, 2, 3):
        own = [name for name in report.datasets if name.startswith(f"chatreid_stage{stage}_")]
        held_out = [name for name in own if name.endswith(HELD_OUT)]
        if len(held_out) == len(own):
            continue
        overrides: list[str] = []
        if stage == 2 and name_dataset("image_captioning", 1) in report.skipped:
            overrides.append("chatreid_encoder=null")
        if held_out:
            overrides.append(f"eval_dataset=chatreid_stage{stage}")
        if report.output_dir != Path("dataset_info"):
            overrides.append(f"dataset_dir={shlex.quote(str(report.output_dir))}")
        commands.append(" ".join([f"FORCE_TORCHRUN=1 llamafactory-cli train examples/stage{stage}.yaml", *overrides]))
    return commands


def share_out(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Return ``total`` shared out by weight, so that the parts add up to it (largest remainders round up)."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    parts = {name: int(value) for name, value in exact.items()}
    # Ties go to the first, since the sort is stable.
    by_remainder = sorted(exact, key=lambda name: parts[name] - exact[name])
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


@dataclass(frozen=True, slots=True)
class PlannedDataset:
    """One data set to build: a task, the stage that trains it, how many records, and whether no identity trains."""

    task: str
    stage: int
    records: int
    held_out: bool = False

    @property
    def name(self) -> str:
        """Its name in ``dataset_info.json``."""
        return name_dataset(self.task, self.stage, self.held_out)


def plan_datasets(
    settings: BuildSettings,
    pools: Sequence[ImagePool],
    report: BuildReport,
    held_out: bool = False,
    stages: Sequence[int] = (1, 2, 3),
) -> list[PlannedDataset]:
    """Return the data sets to build; tasks without records are noted in the report.

    The ratios of Stages 2 and 3 are rescaled over the tasks that remain.

    Args:
        settings: the recipe.
        pools: the images of all sources.
        report: where the reasons go.
        held_out: the pools are those of identities that do not train.
        stages: those that are built from these pools.

    Raises:
        ConfigError: the recipe asks for no records.
    """
    if not settings.records:
        raise ConfigError("`records` names no stage; say how many records to build, e.g. records: {stage2: 100000}.")
    plan: list[PlannedDataset] = []
    ratios = {2: settings.stage2_ratios, 3: settings.stage3_ratios}
    for stage_name, total in settings.records.items():
        stage = int(stage_name.removeprefix("stage"))
        if stage not in stages:
            continue
        trained = choose_pools(pools, settings, stage)
        weights: dict[str, float] = {}
        for task in list_stage_tasks(stage):
            reasons = {explain_missing(task.name, pool) for pool in trained} or {"no source trains this stage"}
            weight = ratios[stage].get(task.name, 0.0) if stage in ratios else 1.0
            if weight == 0:
                reasons = {f"no share in {stage_name}_ratios"}
            if None in reasons:
                weights[task.name] = weight
            else:
                report.skipped[name_dataset(task.name, stage, held_out)] = ", ".join(sorted(str(r) for r in reasons))
        for task, count in share_out(total, weights).items():
            if count:
                plan.append(PlannedDataset(task, stage, count, held_out))
            else:
                report.skipped[name_dataset(task, stage, held_out)] = f"its share of {total} records is less than one"
    return plan


def compute_fingerprint(settings: BuildSettings, plan: PlannedDataset, images_digest: str) -> str:
    """Return a hash over everything a data set's bytes depend on, the images included."""
    # The number of wordings, not their text: records hold the variant's number, so prompts may be edited afterwards.
    digest = xxhash.xxh3_128(repr((__version__, plan, list_variants(plan.task, settings))).encode())
    # Stage 1 shows no gallery: its records stay when features of the model that they trained say who looks alike.
    gallery = settings.gallery if plan.stage in STAGES_WITH_NEGATIVES else None
    digest.update(repr((gallery, settings.cutoff_len)).encode())
    digest.update(repr((settings.records_per_shard, settings.seed, images_digest)).encode())
    digest.update(repr([(s.name, s.weight, s.stages, choose_changes(s)) for s in settings.sources]).encode())
    return digest.hexdigest()


def _is_complete(path: Path, size: int) -> bool:
    """Return whether a shard is there and whole; one that is cut short is built again."""
    try:
        return path.is_file() and check_shard(path) == size
    except DataError:
        return False


def _prepare_folder(settings: BuildSettings, name: str, fingerprint: str, overwrite: bool) -> None:
    """Clear or refuse what other settings left in a data set's folder."""
    provenance = settings.output_dir / f"{name}.json"
    folder = settings.output_dir / name
    if not provenance.is_file():
        if folder.is_file() or (folder.exists() and any(folder.iterdir())):
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


def _prepare_dataset(
    settings: BuildSettings, plan: PlannedDataset, table: Path, digest: str, overwrite: bool
) -> list[ShardJob]:
    """Make room for a data set and return its shards that are missing or cut short; while there are, it is unfinished.

    What it is built from is noted in its provenance.
    """
    fingerprint = compute_fingerprint(settings, plan, digest)
    _prepare_folder(settings, plan.name, fingerprint, overwrite)
    jobs: list[ShardJob] = []
    for shard, first in enumerate(range(0, plan.records, settings.records_per_shard)):
        size = min(settings.records_per_shard, plan.records - first)
        path = settings.output_dir.resolve() / plan.name / f"{shard:05d}.parquet"
        if not _is_complete(path, size):
            jobs.append(ShardJob(table, digest, settings, plan.task, plan.stage, plan.name, shard, size, path))
    provenance = settings.output_dir / f"{plan.name}.json"
    if jobs or not provenance.is_file():
        values = {
            "fingerprint": fingerprint,
            "images_digest": digest,
            "version": __version__,
            # Shards are byte-identical for equal versions of these; another pyarrow may lay a file out differently.
            "versions": {"python": platform.python_version(), "pyarrow": pa.__version__, "numpy": np.__version__},
            "settings": settings.model_dump(mode="json", by_alias=True),
            "records": plan.records,
            "complete": False,
        }
        write_json(provenance, values)
    return jobs


def _finish_dataset(settings: BuildSettings, plan: PlannedDataset, image_root: Path) -> None:
    provenance = settings.output_dir / f"{plan.name}.json"
    if not (values := read_json(provenance)).get("complete"):
        write_json(provenance, {**values, "complete": True})
    enter_dataset(settings.output_dir, plan, image_root, settings.prompts.get(plan.task, ()))


def _remove_leftovers(settings: BuildSettings) -> None:
    """Remove the temporary files of a killed run."""
    for pattern in (".*.parquet.*.tmp", ".*.json.*.tmp", ".*training_images.*"):
        for path in settings.output_dir.glob(pattern):
            path.unlink(missing_ok=True)
    with try_folder(settings.manifest_dir) as alone:
        # Otherwise they may be another command's, which is writing them.
        for source in settings.sources if alone else ():
            for path in settings.manifest_dir.glob(f".{source.name}.parquet.*.tmp"):
                path.unlink(missing_ok=True)


def build_datasets(settings: BuildSettings, dry_run: bool = False, overwrite: bool = False) -> BuildReport:
    """Build one data set per task and enter it in ``dataset_info.json``; finished shards of a killed run are kept.

    Args:
        settings: the recipe.
        dry_run: only say what would be built; nothing is written, not even a manifest.
        overwrite: replace data sets that were built from other settings.

    Raises:
        ConfigError: another build is writing into the folder.
        DataError: sources are missing or wrong, or a data set of other settings is in the way.
    """
    if dry_run:
        return _build_datasets(settings, None, dry_run, overwrite)
    make_folder(settings.output_dir)
    with hold_folder(settings.output_dir, "build"), open_workers(settings) as pool:
        return _build_datasets(settings, pool, dry_run, overwrite)


def _build_datasets(
    settings: BuildSettings, pool: ProcessPoolExecutor | None, dry_run: bool, overwrite: bool
) -> BuildReport:
    images, root, folders = read_training_images(settings, write=not dry_run)
    report = BuildReport(settings.output_dir)
    files = find_feature_files(settings, folders)
    planned = [piece for part in split_people(images, settings) for piece in _plan_part(part, files, report)]
    if dry_run:
        return report
    _remove_leftovers(settings)
    note_left_out(settings.output_dir, report)
    for part in planned:
        _build_part(part, root, pool, overwrite, report)
    return report


@dataclass(frozen=True, slots=True)
class _PlannedPart:
    """One part to build: its recipe, its images, the data sets, and the files that say who looks like whom."""

    settings: BuildSettings
    table: ImageTable
    datasets: list[PlannedDataset]
    files: Mapping[str, FeatureFile]


def _plan_part(part: Part, files: Mapping[str, FeatureFile], report: BuildReport) -> list[_PlannedPart]:
    """Enter in the report what can be built of a part, and return it with its images, screened ones apart."""
    planned: list[_PlannedPart] = []
    for piece in screen_part(part):
        table = ImageTable(combine_images(piece.images))
        datasets = plan_datasets(piece.settings, index_sources(table), report, piece.held_out, piece.stages)
        shown = files if STAGES_WITH_NEGATIVES.intersection(piece.stages) else {}
        check_feature_files(shown, table)
        if datasets:
            planned.append(_PlannedPart(piece.settings, table, datasets, shown))
    if not planned:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.skipped.items())
        whom = " of the identities that validation_share holds out" if part.held_out else ""
        raise DataError(f"Nothing can be built{whom}. {reasons}.")
    report.datasets |= {dataset.name: dataset.records for piece in planned for dataset in piece.datasets}
    return planned


def _build_part(
    part: _PlannedPart, root: Path, pool: ProcessPoolExecutor | None, overwrite: bool, report: BuildReport
) -> None:
    """Build the data sets of one part; each is entered as soon as it is whole."""
    settings, table = part.settings, part.table
    digest = combine_digests(digest_images(table.table), part.files)
    # Not beside the manifests: another build that reads them may be under way.
    path = settings.output_dir.resolve() / f".training_images.{digest}.arrow"
    missing = {plan.name: _prepare_dataset(settings, plan, path, digest, overwrite) for plan in part.datasets}
    plans = {plan.name: plan for plan in part.datasets}
    whole = [name for name, jobs in missing.items() if not jobs]
    for name in whole:
        _finish_dataset(settings, plans[name], root)
    report.reused += whole
    jobs = [job for own in missing.values() for job in own]
    if not jobs:
        return
    write_image_table(path, add_look_alikes(part.files, table, index_sources(table)))
    left, count, start = Counter(job.name for job in jobs), sum(job.count for job in jobs), time.perf_counter()
    try:
        with (
            tqdm(total=count, desc="records", unit="record", unit_scale=True) as progress,
            closing(run_jobs(jobs, settings, pool)) as finished,
        ):
            for job in finished:
                progress.update(job.count)
                left[job.name] -= 1
                if left[job.name] == 0:
                    _finish_dataset(settings, plans[job.name], root)
    finally:
        path.unlink(missing_ok=True)
    report.written += count
    report.seconds += time.perf_counter() - start


def note_left_out(output_dir: Path, report: BuildReport) -> None:
    """Write down why data sets are not there, for the training run that asks for them; earlier builds' notes stay."""
    path = output_dir / LEFT_OUT
    noted = dict(read_json(path)) if path.is_file() else {}
    kept = {name: reason for name, reason in noted.items() if name not in report.datasets}
    if (left_out := kept | report.skipped) != noted:
        write_json(path, left_out)


def enter_dataset(output_dir: Path, plan: PlannedDataset, image_root: Path, own_prompts: Sequence[str] = ()) -> None:
    """Enter a data set in ``dataset_info.json`` (LLaMA-Factory's file), other entries untouched.

    The user's wordings stand there too, where they may be edited without building again.
    """
    path = output_dir / DATASET_INFO
    entries: Any = read_json(path) if path.is_file() else {}
    if not isinstance(entries, dict):
        raise DataError(f"{path} is not a JSON object of data sets. Move it away.")
    relative = Path(os.path.relpath(image_root, output_dir.resolve())).as_posix()
    block: dict[str, Any] = {"image_root": relative, "stage": plan.stage}
    if own_prompts:
        block["prompts"] = list(own_prompts)
    entries[plan.name] = {"file_name": plan.name, "formatting": FORMATTING, "chatreid": block}
    write_json(path, entries)

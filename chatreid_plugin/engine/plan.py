"""Which data sets are built, with how many records each, and what stands against it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config import BuildSettings
from ..errors import ConfigError
from ..tasks import list_stage_tasks
from .builders import explain_missing
from .built_datasets import HELD_OUT
from .sampler import ImagePool
from .shard_jobs import select_pools


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
        """Return the report as text, with the ``dataset`` key of each stage's training recipe."""
        lines = [f"{name:<48}{count:>12,} records" for name, count in self.datasets.items()]
        lines += [f"{name:<48}{'left out':>12}: {reason}" for name, reason in self.skipped.items()]
        for stage in ("stage1", "stage2", "stage3"):
            names = [name for name in self.datasets if name.startswith(f"chatreid_{stage}_")]
            held_out = [name for name in names if name.endswith(HELD_OUT)]
            trained = [name for name in names if name not in held_out]
            lines += [f"{stage}: dataset={','.join(trained)}"] if trained else []
            lines += [f"{stage}: eval_dataset={','.join(held_out)}"] if held_out else []
        if self.written:
            rate = self.written / max(self.seconds, 1e-9)
            lines.append(f"{self.written:,} records written in {self.seconds:.1f} s ({rate:,.0f} records/s)")
        return "\n".join([*lines, f"dataset_dir: {self.output_dir}"])

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
    settings: BuildSettings, pools: Sequence[ImagePool], report: BuildReport, held_out: bool = False
) -> list[PlannedDataset]:
    """Return the data sets to build; tasks without records are noted in the report.

    The ratios of Stages 2 and 3 are rescaled over the tasks that remain.

    Args:
        settings: the recipe.
        pools: the images of all sources.
        report: where the reasons go.
        held_out: the pools are those of identities that do not train.

    Raises:
        ConfigError: the recipe asks for no records.
    """
    if not settings.records:
        raise ConfigError("`records` names no stage; say how many records to build, e.g. records: {stage2: 100000}.")
    plan: list[PlannedDataset] = []
    ratios = {2: settings.stage2_ratios, 3: settings.stage3_ratios}
    for stage_name, total in settings.records.items():
        stage = int(stage_name.removeprefix("stage"))
        trained = select_pools(pools, settings, stage)
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

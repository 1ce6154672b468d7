"""Which data sets are built, with how many records each, and what stands against it."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config import BuildSettings
from ..errors import ConfigError
from ..shards import HELD_OUT
from ..tasks import list_stage_tasks
from .builders import explain_missing
from .sampler import ImagePool
from .shard_jobs import choose_pools


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

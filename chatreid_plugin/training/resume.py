"""Which checkpoint a run goes on from, decided as its arguments are parsed: a whole one of the same kind, or an error.

The weights are put into the model by ``resumed_weights.py``.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from ..adapters import ADAPTER_CONFIG
from ..errors import ConfigError
from ..printing import say
from ..weight_files import has_weights


# The Trainer writes it after the weights and the optimizer.
LAST_WRITTEN = "trainer_state.json"
# LLaMA-Factory 0.9.5 resumes neither: its value head is in a file of its own, and PPO has a loop of its own.
STAGES_WITHOUT_RESUMING = ("rm", "ppo")


@dataclass(frozen=True, slots=True)
class Run:
    """What the choice depends on.

    ``named``: the user wrote ``resume_from_checkpoint``; otherwise LLaMA-Factory found the checkpoint in the output
    folder. ``deepspeed``: the optimizer is DeepSpeed's, in files of its own.
    """

    output_dir: Path
    named: bool
    deepspeed: bool = False
    stage: str = "sft"
    swaps: bool = False


def describe_run(data_args: Any, training_args: Any, finetuning_args: Any, named: bool) -> Run:
    """Return what the choice depends on, from LLaMA-Factory's parsed arguments."""
    return Run(
        output_dir=Path(training_args.output_dir),
        named=named,
        deepspeed=training_args.deepspeed_plugin is not None,
        stage=finetuning_args.stage,
        swaps=data_args.chatreid_encoder is not None,
    )


def find_whole_checkpoint(output_dir: Path) -> Path | None:
    """Return the latest checkpoint of a run that was written to its end."""
    numbered = [folder for folder in output_dir.glob("checkpoint-*") if folder.name.rpartition("-")[2].isdecimal()]
    whole = [folder for folder in numbered if (folder / LAST_WRITTEN).is_file()]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def find_named_checkpoint(args: Any) -> str | bool | None:
    """Return ``resume_from_checkpoint`` as a run's own arguments say it, a mapping or words of a command line."""
    key = "resume_from_checkpoint"
    if isinstance(args, dict):
        return cast(dict[str, Any], args).get(key)
    words = [part for word in args or () for part in str(word).split("=", 1)]
    return next((value for word, value in pairwise(words) if word == f"--{key}"), None)


def has_optimizer(folder: Path, deepspeed: bool) -> bool:
    """Tell whether a checkpoint holds optimizer and schedule, for a run with or without DeepSpeed.

    Without them transformers 5.5.4 (trainer.py, ``_load_optimizer_and_scheduler``) begins both anew, warm-up
    included, and says nothing. FSDP writes a folder ``optimizer_0``.
    """
    names = [path.name for path in folder.iterdir()]
    if deepspeed:
        return any(name.startswith("global_step") for name in names)
    return "scheduler.pt" in names and any("optimizer" in name for name in names)


def choose_checkpoint(resume: str | bool | None, run: Run) -> str | bool | None:
    """Return what to resume from: not a checkpoint that a killed run left half-written.

    Args:
        resume: ``resume_from_checkpoint``, or what LLaMA-Factory found in the output folder.
        run: the run that is to go on.

    Raises:
        ConfigError: the named folder is missing or half-written, which says which one is whole; or the checkpoint
            has no optimizer, or its training stage cannot be resumed, which says how to start from it.
    """
    if not resume:
        return resume
    chosen = _choose_whole(resume, run)
    if isinstance(chosen, str):
        _refuse_unfit(Path(chosen), run)
    return chosen


def _choose_whole(resume: str | bool, run: Run) -> str | bool | None:
    if isinstance(resume, str) and (Path(resume) / LAST_WRITTEN).is_file():
        return resume
    whole = find_whole_checkpoint(run.output_dir)
    if resume is True:
        return True if whole is None else str(whole)  # the Trainer says that there is none
    if run.named:
        state = "is half-written" if Path(str(resume)).is_dir() else "is not a folder"
        remedy = (
            f"Set resume_from_checkpoint: {whole}." if whole else "Set resume_from_checkpoint: null to start anew."
        )
        raise ConfigError(f"resume_from_checkpoint: {resume} {state}: it has no {LAST_WRITTEN}. {remedy}")
    say(f"chatreid: {resume} is half-written; resuming from {whole or 'the start'}.", aside=True)
    return None if whole is None else str(whole)


def _refuse_unfit(checkpoint: Path, run: Run) -> None:
    if run.stage in STAGES_WITHOUT_RESUMING:
        found = f"LLaMA-Factory cannot resume stage: {run.stage} from {checkpoint}."
        raise ConfigError(f"{found} {_advise(checkpoint, run)}")
    if not has_optimizer(checkpoint, run.deepspeed):
        kind = "DeepSpeed states (global_step*)" if run.deepspeed else "optimizer.pt and scheduler.pt"
        raise ConfigError(
            f"{checkpoint} cannot be resumed from: it has no {kind}, as with save_only_model: true or a run "
            f"{'without' if run.deepspeed else 'with'} DeepSpeed. Warm-up and optimizer would begin anew. "
            f"{_advise(checkpoint, run)}"
        )


def _advise(checkpoint: Path, run: Run) -> str:
    """Return how to begin a new run with a checkpoint's weights."""
    adapter = (checkpoint / ADAPTER_CONFIG).is_file() and not has_weights(checkpoint)
    key = "adapter_name_or_path" if adapter else "model_name_or_path"
    steps = [f"{key}: {checkpoint}", "another output_dir"]
    if run.named:
        steps.append("no resume_from_checkpoint")
    if run.swaps and not adapter:
        steps.append("no chatreid_encoder, which it has already")
    anew = "" if run.named else f", or set overwrite_output_dir: true to begin {run.output_dir} anew"
    return f"To begin a new run with its weights, set {steps[0]} with {' and '.join(steps[1:])}{anew}."

"""Going on from a checkpoint: which one, and its weights into the model.

transformers 5 writes the decoder as ``model.layers.*`` (some versions also the tower as ``visual.*``) but holds it as
``model.language_model.layers.*``, and its Trainer loads by name and ignores what does not fit: a resumed run would go
on with the decoder that it started from, and a warning among hundreds of lines. DeepSpeed and FSDP have files of their
own and are not concerned. Reported elsewhere as QwenLM/Qwen3-VL#1763 and modelscope/ms-swift#7947.
"""

import sys
from collections.abc import Collection
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import ConfigError
from ..upstream import get_upstream
from .checkpoint import find_vision_suffix, find_weight_files, open_weights
from .compat import get_function


# The Trainer writes it after the weights and the optimizer.
LAST_WRITTEN = "trainer_state.json"


def find_whole_checkpoint(output_dir: Path) -> Path | None:
    """Return the latest checkpoint of a run that was written to its end."""
    whole = [folder for folder in output_dir.glob("checkpoint-*") if (folder / LAST_WRITTEN).is_file()]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def choose_checkpoint(resume: str | bool | None, output_dir: Path, named: bool) -> str | bool | None:
    """Return what to resume from: not a checkpoint that a killed run left half-written.

    Args:
        resume: ``resume_from_checkpoint``, or what LLaMA-Factory found in the output folder.
        output_dir: the run's output folder.
        named: whether the user wrote the checkpoint's name.

    Raises:
        ConfigError: the named folder is missing or half-written; says which one is whole.
    """
    if not resume or (isinstance(resume, str) and (Path(resume) / LAST_WRITTEN).is_file()):
        return resume
    whole = find_whole_checkpoint(output_dir)
    if resume is True:
        return True if whole is None else str(whole)  # the Trainer says that there is none
    if named:
        state = "is half-written" if Path(resume).is_dir() else "is no folder"
        remedy = (
            f"Set resume_from_checkpoint: {whole}." if whole else "Set resume_from_checkpoint: null to start anew."
        )
        raise ConfigError(f"resume_from_checkpoint: {resume} {state}: it has no {LAST_WRITTEN}. {remedy}")
    print(f"chatreid: {resume} is half-written; resuming from {whole or 'the start'}.", file=sys.stderr)
    return None if whole is None else str(whole)


def find_model_name(stored: str, names: Collection[str]) -> str | None:
    """Return the parameter's name in the model for its name in a file of any transformers from 4.52 to 5.x."""
    suffix = find_vision_suffix(stored)
    if suffix is not None:
        candidates = [stored, f"model.visual.{suffix}", f"visual.{suffix}"]
    elif stored.startswith("model.language_model."):
        candidates = [stored, "model." + stored.removeprefix("model.language_model.")]
    else:
        candidates = [stored, "model.language_model." + stored.removeprefix("model.")]
    return next((name for name in candidates if name in names), None)


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy all weights of a checkpoint into a model, whatever version of transformers wrote it.

    Raises:
        ConfigError: a tensor is of no parameter, a parameter is in no file, or a shape differs.
    """
    targets = model.state_dict()
    # Tied weights, which are in the file once, have one name here.
    missing = {name for name, _ in model.named_parameters()}
    files = find_weight_files(folder)
    for path in sorted(set(files.values())):
        with open_weights(path) as opened:
            for stored in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                name, tensor = find_model_name(stored, targets), opened.get_tensor(stored)
                if name is None or targets[name].shape != tensor.shape:
                    raise ConfigError(f"{path}: {stored} with shape {tuple(tensor.shape)} is no tensor of the model.")
                with torch.no_grad():
                    targets[name].copy_(tensor)
                missing.discard(name)
    if missing:
        raise ConfigError(f"{folder} lacks {len(missing)} of the model's parameters, first {min(missing)}.")


def extend_resuming(module: ModuleType) -> None:
    """Load a full checkpoint by :func:`load_weights`, inside ``llamafactory.train.sft.trainer``."""
    load_checkpoint = get_function(module, "CustomSeq2SeqTrainer._load_from_checkpoint")
    load_best = get_function(module, "CustomSeq2SeqTrainer._load_best_model")

    def is_ours(trainer: Any) -> bool:
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        arguments = trainer.finetuning_args
        full = arguments.finetuning_type in ("full", "freeze")
        return full and not sharded and getattr(arguments, "chatreid_stage", None) is not None

    @wraps(load_checkpoint)
    def load_whole_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_ours(self):
            load_weights(model or self.model, Path(resume_from_checkpoint))
        else:
            load_checkpoint(self, resume_from_checkpoint, model)

    @wraps(load_best)
    def load_whole_best_model(self: Any) -> None:
        if is_ours(self):
            load_weights(self.model, Path(self.state.best_model_checkpoint))
        else:
            load_best(self)

    trainer = get_upstream(module, "CustomSeq2SeqTrainer")
    trainer._load_from_checkpoint = load_whole_checkpoint
    trainer._load_best_model = load_whole_best_model

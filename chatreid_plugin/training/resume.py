"""Going on from a checkpoint: which one, all of its weights, and no step beyond the run's end.

The checkpoint is chosen as the run's arguments are parsed: a whole one of the same kind, or an error. The weights are
put back when the Trainer loads it. transformers 5 writes the decoder of a vision-language model as ``model.layers.*``
(some versions also the tower as ``visual.*``) but holds it as ``model.language_model.layers.*``, and its Trainer loads
by name and ignores what does not fit: a run that is resumed, or that ends with ``load_best_model_at_end``, would go on
with the decoder that it has, and a warning among hundreds of lines. So every Trainer of this process, whatever it
trains, is asked first whether the names on disk are the model's. DeepSpeed and FSDP have files of their own, with the
names in memory, and are not concerned. Reported elsewhere as QwenLM/Qwen3-VL#1763 and modelscope/ms-swift#7947.
"""

from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from llamafactory.extras import logging
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..checkpoints import ADAPTER_CONFIG, find_weight_files, has_weights, open_weights
from ..errors import ConfigError
from ..printing import say
from ..shards import read_json
from ..upstream import get_upstream
from .checkpoint import match_names
from .compat import get_function


# The Trainer writes it after the weights and the optimizer.
LAST_WRITTEN = "trainer_state.json"
# LLaMA-Factory 0.9.5 resumes neither: its value head is in a file of its own, and PPO has a loop of its own.
STAGES_WITHOUT_RESUMING = ("rm", "ppo")
# LLaMA-Factory's workflows write it into the output folder after training.
RESULTS = "train_results.json"


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


def fits_by_name(model: torch.nn.Module, folder: Path) -> bool:
    """Tell whether loading by name leaves nothing out: each tensor is the model's, and each parameter is there.

    Tied weights, which are in the file once, have one name among the parameters.
    """
    stored = find_weight_files(folder).keys()
    return stored <= model.state_dict().keys() and {name for name, _ in model.named_parameters()} <= stored


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy all weights of a checkpoint into a model, whatever version of transformers wrote it.

    Raises:
        ConfigError: a tensor is of no parameter, a parameter is in no file, or a shape differs.
    """
    targets, names = model.state_dict(), match_names(model, folder, _advise_start(folder))
    for path in sorted(set(find_weight_files(folder).values())):
        with open_weights(path) as opened, torch.no_grad():
            for stored in names.keys() & set(opened.keys()):
                targets[names[stored]].copy_(opened.get_tensor(stored))


def _advise_start(folder: Path) -> str:
    return f"Start from it as a model (model_name_or_path: {folder}) or resume from a checkpoint of this very run."


def _loads_whole(trainer: Any, model: torch.nn.Module, folder: Path) -> bool:
    """Load a checkpoint whose names do not fit; tell whether that was so.

    Raises:
        ConfigError: the checkpoint is of another kind of run, or does not fit the model.
    """
    from peft import PeftModel

    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    adapted = isinstance(model, PeftModel)
    if has_weights(folder):
        if adapted:
            raise ConfigError(f"{folder} holds a whole model, but this run trains an adapter. {_advise_start(folder)}")
        if fits_by_name(model, folder):
            return False
        load_weights(model, folder)
        return True
    if (folder / ADAPTER_CONFIG).is_file() and not adapted:
        raise ConfigError(
            f"{folder} holds an adapter, which LLaMA-Factory does not resume into this kind of model. Start from it: "
            f"adapter_name_or_path: {folder} instead of resume_from_checkpoint, and another output_dir."
        )
    return False


def extend_resuming(module: ModuleType) -> None:
    """Let every Trainer load a whole checkpoint, or refuse it, and train no step beyond a run's end.

    ``module`` is ``llamafactory.train.callbacks``, which all of LLaMA-Factory's trainers import first.
    """
    import transformers.trainer

    load_checkpoint = get_function(transformers.trainer, "Trainer._load_from_checkpoint")
    load_best = get_function(transformers.trainer, "Trainer._load_best_model")

    @wraps(load_checkpoint)
    def load_whole_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if not _loads_whole(self, self.model if model is None else model, Path(resume_from_checkpoint)):
            load_checkpoint(self, resume_from_checkpoint, model)

    @wraps(load_best)
    def load_whole_best_model(self: Any) -> None:
        if not _loads_whole(self, self.model, Path(self.state.best_model_checkpoint)):
            load_best(self)

    trainer = get_upstream(transformers.trainer, "Trainer")
    trainer._load_from_checkpoint = load_whole_checkpoint
    trainer._load_best_model = load_whole_best_model
    extend_training(trainer)


class TrainingFinished(Exception):
    """The run stands at its last step as training is about to begin."""


class StopAtTheEnd(TrainerCallback):
    """Leaves a run that has no step left; only the Trainer knows the number, once the checkpoint is loaded."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise what ends ``Trainer.train``, below."""
        if 0 < state.max_steps <= state.global_step:
            raise TrainingFinished


def end_finished_run(trainer: Any) -> TrainOutput:
    """Do what is left of a training without steps: say so, take the best model, tell the callbacks.

    The caller goes on as after a training: it writes the model, which a run killed before that lacks, and evaluates.
    """
    state = trainer.state
    logger: Any = logging.get_logger(__name__)  # LLaMA-Factory adds warning_rank0 and its like to the class
    logger.warning_rank0(
        f"chatreid: this run is finished, at step {state.global_step} of {state.max_steps}: nothing is trained. Raise "
        "num_train_epochs or max_steps to go on, or set overwrite_output_dir: true to begin anew."
    )
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()
    trainer.is_in_train = False
    trainer.control = trainer.callback_handler.on_train_end(trainer.args, state, trainer.control)
    written = Path(trainer.args.output_dir) / RESULTS
    results: dict[str, float] = read_json(written) if written.is_file() else {}  # LLaMA-Factory writes them again
    return TrainOutput(state.global_step, results.get("train_loss", float("nan")), results)


def extend_training(trainer_class: Any) -> None:
    """Let every Trainer end a finished run without a step.

    transformers 5.5.4 looks at the step limit only after a step: a finished run that is started once more, as
    schedulers and ``overwrite_output_dir: false`` do, trains one step beyond its end each time, and changes the
    weights.
    """
    train = trainer_class.train

    @wraps(train)
    def train_what_is_left(self: Any, *args: Any, **kwargs: Any) -> TrainOutput:
        callback = StopAtTheEnd()
        self.add_callback(callback)
        try:
            return train(self, *args, **kwargs)
        except TrainingFinished:
            return end_finished_run(self)
        finally:
            self.remove_callback(callback)

    trainer_class.train = train_what_is_left

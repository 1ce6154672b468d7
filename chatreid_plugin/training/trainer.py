"""What the plugin adds to LLaMA-Factory's runs: a learning rate of the vision encoder, callbacks, the system prompt.

``chatreid_vision_learning_rate``: the encoder is what Stage 2 keeps when it swaps the decoder: the tower, and the
merger unless ``chatreid_projector`` is ``decoder``. LLaMA-Factory 0.9.5 has one rate for all parameters (its issue
5831 asks for more). The optimizer is made as always; then each of its groups is split in two, so weight decay, the
scheduler and its warm-up stay what they are.

The system prompt of a run is recorded with what it trains, and taken up by what goes on from there. Stock
LLaMA-Factory forgets ``default_system`` with the run; the model would be asked in other words later.
"""

import math
from collections.abc import Iterable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints import read_system_prompt, write_system_prompt
from ..errors import ConfigError
from ..tasks import find_default_system
from ..upstream import get_upstream
from .batches import extend_sampler
from .compat import get_function
from .cutoff import TrimmedReport
from .loss import extend_loss
from .model import find_part
from .recipe_model import TEMPLATE_FAMILIES


KEY = "chatreid_vision_learning_rate"
# The keys with which LLaMA-Factory makes an optimizer of its own: train/trainer_utils.py, create_custom_optimizer.
OWN_OPTIMIZERS = ("use_galore", "use_apollo", "loraplus_lr_ratio", "use_badam", "use_adam_mini", "use_muon")
# On the training arguments, which are all that a callback is given.
ATTRIBUTE = "chatreid_system_prompt"


def parse_rate(value: float | str | None) -> float | None:
    """Return the key's value as a number; YAML reads ``1e-6``, without a point, as a string.

    Raises:
        ConfigError: it is no positive number.
    """
    if value is None:
        return None
    try:
        rate = float(value)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"{KEY} must be a positive number, not {value!r}; to freeze: `freeze_vision_tower: true`.")
    return rate


def check_vision_rate(rate: float | None, training_args: Any, finetuning_args: Any) -> None:
    """Refuse a rate that the run would not follow.

    Raises:
        ConfigError: the run is no SFT, or something else sets the rates of the parameters.
    """
    if rate is None:
        return
    if finetuning_args.stage != "sft":
        raise ConfigError(f"{KEY} works with `stage: sft` only, found stage {finetuning_args.stage!r}.")
    for name in OWN_OPTIMIZERS:
        if getattr(finetuning_args, name, None):
            raise ConfigError(f"{KEY} does not work with {name}, which makes its own groups. Remove one of the two.")
    deepspeed = getattr(training_args, "hf_deepspeed_config", None)
    for name in ("optimizer", "scheduler"):
        if deepspeed is not None and name in deepspeed.config:
            raise ConfigError(
                f"{KEY} is set, but the DeepSpeed file {training_args.deepspeed} has its own {name!r}, which knows "
                f"one rate. Remove {name!r} from that file: LLaMA-Factory then makes it from the YAML keys."
            )


def set_vision_rate(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    rate: float,
    projector: str,
) -> None:
    """Split every group of a fresh optimizer into the vision encoder, with its own rate, and the rest.

    Args:
        optimizer: with no step done; changed in place.
        parameters: (name, parameter) of the model.
        rate: the vision encoder's peak learning rate.
        projector: whose part the merger is, ``encoder`` or ``decoder``.

    Raises:
        ConfigError: no parameter of the encoder trains, or FSDP has merged parameters of several parts.
    """
    parts = {"vision", "projector"} if projector == "encoder" else {"vision"}
    vision: set[int] = set()
    for name, parameter in parameters:
        if name.endswith("_flat_param"):
            raise ConfigError(f"{KEY} needs `fsdp_use_orig_params: true`: FSDP has merged the parameters into {name}.")
        if parameter.requires_grad and find_part(name) in parts:
            vision.add(id(parameter))
    if not vision:
        raise ConfigError(f"{KEY} is set, but no parameter of the vision encoder trains. Unfreeze it or drop the key.")
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        rest = [parameter for parameter in group["params"] if id(parameter) not in vision]
        encoder = [parameter for parameter in group["params"] if id(parameter) in vision]
        if rest:
            optimizer.add_param_group(group | {"params": rest})
        if encoder:
            optimizer.add_param_group(group | {"params": encoder, "lr": rate})


def extend_optimizer(module: ModuleType) -> None:
    """Apply the key as the optimizer is made, inside ``llamafactory.train.sft.trainer``."""
    create_optimizer = get_function(module, "CustomSeq2SeqTrainer.create_optimizer")

    @wraps(create_optimizer)
    def create_split_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_new = self.optimizer is None
        optimizer = create_optimizer(self, *args, **kwargs)
        rate = getattr(self.finetuning_args, KEY, None)
        if is_new and rate is not None:
            # Under FSDP the trainer hands over the wrapped model, whose parameters the optimizer has.
            model = args[0] if args else kwargs.get("model") or self.model
            set_vision_rate(optimizer, model.named_parameters(), rate, self.finetuning_args.chatreid_projector)
        return optimizer

    get_upstream(module, "CustomSeq2SeqTrainer").create_optimizer = create_split_optimizer


def extend_trainer(module: ModuleType) -> None:
    """Give the trainer of ``llamafactory.train.sft.trainer`` the vision encoder's rate, our batches and our loss."""
    extend_optimizer(module)
    extend_sampler(module)
    extend_loss(module)


def find_prompt(data_args: Any) -> str | None:
    """Return the system prompt that a run's conversations begin with, None where the template is not ours."""
    if data_args.template not in TEMPLATE_FAMILIES:
        return None
    default = find_default_system(TEMPLATE_FAMILIES[data_args.template][0])
    return default if data_args.default_system is None else data_args.default_system


def read_recorded(model: str, adapters: str | list[str] | None) -> str | None:
    """Return what the last adapter, or the model if there is none, was trained with; None if it does not say."""
    names = adapters.split(",") if isinstance(adapters, str) else adapters
    return read_system_prompt(Path(names[-1] if names else model))


def take_recorded_prompt(model_args: Any, data_args: Any) -> None:
    """Ask a model in the words that it was trained in, unless the user gives others."""
    if find_prompt(data_args) is not None and data_args.default_system is None:
        data_args.default_system = read_recorded(model_args.model_name_or_path, model_args.adapter_name_or_path)


class PromptRecord(TrainerCallback):
    """Writes the record into every checkpoint and, before the model is saved there, into the output folder."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint that has just been saved."""
        self._write(args, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the final model."""
        self._write(args, Path(args.output_dir))

    def _write(self, args: Any, folder: Path) -> None:
        prompt = getattr(args, ATTRIBUTE, None)
        if args.should_save and prompt is not None:
            write_system_prompt(folder, prompt)


def extend_tuner(module: ModuleType) -> None:
    """Add our callbacks to every trainer, and the record of the system prompt to an exported model."""
    training_function = get_function(module, "_training_function")
    export_model = get_function(module, "export_model")
    read_args, get_infer_args = (get_upstream(module, name) for name in ("read_args", "get_infer_args"))

    @wraps(training_function)
    def train_with_callbacks(config: dict[str, Any]) -> None:
        callbacks = [*(config.get("callbacks") or ()), TrimmedReport(), PromptRecord()]
        training_function(config | {"callbacks": callbacks})

    @wraps(export_model)
    def export_with_record(args: Any = None) -> None:
        values = read_args(args)
        export_model(values)
        model_args, data_args, *_ = get_infer_args(values)
        prompt = find_prompt(data_args)
        if prompt is not None:
            write_system_prompt(Path(model_args.export_dir), prompt)

    module._training_function = train_with_callbacks  # type: ignore[attr-defined]
    module.export_model = export_with_record  # type: ignore[attr-defined]

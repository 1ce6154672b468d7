"""``chatreid_vision_learning_rate``: a learning rate of its own for the vision encoder.

The encoder is what Stage 2 keeps when it swaps the decoder: the tower, and the merger unless ``chatreid_projector`` is
``decoder``. LLaMA-Factory 0.9.5 has one rate for all parameters (its issue 5831 asks for more). The optimizer is made
as always; then each of its groups is split in two, so weight decay, the scheduler and its warm-up stay what they are.
"""

import math
from collections.abc import Iterable
from functools import wraps
from types import ModuleType
from typing import Any

import torch

from ..errors import ConfigError
from ..upstream import get_upstream
from .compat import get_function
from .model import find_part


KEY = "chatreid_vision_learning_rate"
# The keys with which LLaMA-Factory makes an optimizer of its own: train/trainer_utils.py, create_custom_optimizer.
OWN_OPTIMIZERS = ("use_galore", "use_apollo", "loraplus_lr_ratio", "use_badam", "use_adam_mini", "use_muon")


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

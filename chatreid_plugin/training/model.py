"""The check that exactly the parameters a stage names are trainable, after LLaMA-Factory has set up the model.

LLaMA-Factory freezes vision tower and projector by default, and matches by name: a wrong flag or prefix would train
nothing, or everything, without a word.
"""

from collections.abc import Collection, Iterable
from functools import wraps
from types import ModuleType
from typing import Any, Literal

from llamafactory.extras import logging

from ..checkpoints import guard_peft
from ..errors import ConfigError, UpstreamError
from ..vision_tower import speed_up_vision_tower
from .compat import get_function


Part = Literal["vision", "projector", "language"]
FLAGS: dict[Part, str] = {
    "vision": "freeze_vision_tower",
    "projector": "freeze_multi_modal_projector",
    "language": "freeze_language_model",
}


def find_part(parameter: str) -> Part:
    """Return which part of a Qwen-VL model a parameter belongs to; the merger is the projector."""
    if "visual." not in parameter:
        return "language"
    return "projector" if ".merger." in parameter else "vision"


def list_trained_parts(stage: int, projector: str) -> set[Part]:
    """Return the parts a stage trains with full tuning: all in Stages 1 and 2, no encoder in Stage 3 (paper 3.3)."""
    if stage in (1, 2):
        return {"vision", "projector", "language"}
    return {"language"} if projector == "encoder" else {"language", "projector"}


def list_frozen_parts(finetuning_args: Any) -> set[Part]:
    """Return the parts that the recipe's flags freeze."""
    return {part for part, flag in FLAGS.items() if getattr(finetuning_args, flag)}


def check_trainable(
    parameters: Iterable[tuple[str, bool]],
    stage: int,
    projector: str,
    finetuning_type: str,
    frozen_parts: Collection[Part] = (),
) -> None:
    """Refuse a model whose trainable parameters are not those of the stage.

    Full tuning trains every parameter of the stage's parts. LoRA, OFT and freeze tuning train some of each part that
    its flag leaves free; the flags may leave out vision and projector to save memory, but never the decoder.

    Args:
        parameters: (name, trainable) of every parameter.
        stage: 1, 2 or 3.
        projector: whose part the merger is, ``encoder`` or ``decoder``.
        finetuning_type: LLaMA-Factory's key: full, lora, freeze, oft.
        frozen_parts: the parts that the flags freeze; with full tuning they have to be the stage's.

    Raises:
        ConfigError: a part trains that should not, or does not train that should; names the key to set.
    """
    expected = list_trained_parts(stage, projector)
    counts: dict[Part, list[int]] = {part: [0, 0] for part in FLAGS}
    for name, trainable in parameters:
        counts[find_part(name)][trainable] += 1
    full = finetuning_type == "full"
    faults: list[str] = []
    for part, (frozen, trained) in counts.items():
        if part not in expected and trained:
            remedy = f"set {FLAGS[part]}: true"
            if part in frozen_parts:  # a loaded adapter reaches it
                remedy = "merge the adapter first (llamafactory-cli export examples/merge_lora.yaml)"
            faults.append(f"{trained} {part} parameter(s) train but must be frozen: {remedy}")
        elif part in expected and full and (frozen or not trained):
            faults.append(f"{frozen} {part} parameter(s) are frozen but must train: set {FLAGS[part]}: false")
        elif part in expected and not full and not trained and (part == "language" or part not in frozen_parts):
            faults.append(f"no {part} parameter trains: {_advise_partial(part, part in frozen_parts)}")
    if not any(trained for _, trained in counts.values()):
        faults.append("no parameter trains at all")
    if faults:
        raise ConfigError(
            f"chatreid_stage: {stage} with finetuning_type: {finetuning_type}: " + "; ".join(faults) + "."
        )


def _advise_partial(part: Part, frozen: bool) -> str:
    """Return how LoRA and its like come to train a part."""
    if part == "projector":  # LLaMA-Factory 0.9.5 (model_utils/misc.py) gives it no adapter
        return "set additional_target: merger, or freeze_multi_modal_projector: true to leave it as it is"
    return f"set {FLAGS[part]}: false" if frozen else "set lora_target: all"


def _speed_up_vision_tower(model: Any) -> None:
    logger: Any = logging.get_logger(__name__)  # LLaMA-Factory adds info_rank0 and its like to the class
    try:
        layers = speed_up_vision_tower(model)
    except UpstreamError as error:  # only speed is lost, so the run goes on
        logger.warning_rank0(f"chatreid: the vision tower attends to one image at a time, as stock: {error}")
    else:
        logger.info_rank0(f"chatreid: {layers} vision layers attend to all images of one size in one call.")


def extend_model_loader(module: ModuleType) -> None:
    """After ``init_adapter`` of ``llamafactory.model.loader``: check what trains, speed up the vision tower.

    PEFT, which that function loads adapters with, is guarded first.
    """
    guard_peft()
    init_adapter = get_function(module, "init_adapter")

    @wraps(init_adapter)
    def init_checked_adapter(
        config: Any, model: Any, model_args: Any, finetuning_args: Any, is_trainable: bool
    ) -> Any:
        model = init_adapter(config, model, model_args, finetuning_args, is_trainable)
        stage = getattr(finetuning_args, "chatreid_stage", None)
        if is_trainable and stage is not None:
            parameters = ((name, parameter.requires_grad) for name, parameter in model.named_parameters())
            check_trainable(
                parameters,
                stage,
                finetuning_args.chatreid_projector,
                finetuning_args.finetuning_type,
                list_frozen_parts(finetuning_args),
            )
        if stage is not None:
            _speed_up_vision_tower(model)
        return model

    module.init_adapter = init_checked_adapter  # type: ignore[attr-defined]

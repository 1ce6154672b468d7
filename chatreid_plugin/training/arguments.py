"""The YAML keys ``chatreid_*`` and what they set in motion once all arguments are parsed.

They are fields added to LLaMA-Factory's own data arguments, so that YAML, ``key=value`` and ``-h`` know them.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from llamafactory.hparams.data_args import DataArguments

from ..errors import ConfigError, UpstreamError
from ..images import ImagePolicy
from ..shards import read_json
from ..upstream import get_upstream
from .checkpoint import (
    COMPOSED_FOLDER,
    MARKER,
    check_adapter_base,
    check_completeness,
    compose_checkpoint,
    find_local_checkpoint,
)
from .compat import ARGUMENT_LISTS, get_function
from .cutoff import OVER_CUTOFF, start_trimmed_list
from .dataset_info import expand_stages
from .images import BAD_IMAGE, start_bad_image_list
from .loss import WEIGHTINGS, choose_loss
from .recipe_checks import refuse_pitfalls
from .resume import choose_checkpoint, describe_run, find_named_checkpoint
from .trainer import ATTRIBUTE, check_vision_rate, find_prompt, parse_rate, take_recorded_prompt


@dataclass
class ChatReIDDataArguments(DataArguments):
    """LLaMA-Factory's data arguments plus the plugin's keys."""

    chatreid_stage: int | None = field(
        default=None,
        metadata={"help": "ChatReID stage (1, 2 or 3): sets the image policy and the check of what trains."},
    )
    chatreid_encoder: str | None = field(
        default=None,
        metadata={
            "help": "Decoder swap: take the vision encoder from this checkpoint folder, the rest from the model."
        },
    )
    chatreid_projector: str = field(
        default="encoder",
        metadata={
            "help": "Whose merger the swap keeps: `encoder` or `decoder`. In Stage 3 it freezes with its owner."
        },
    )
    chatreid_aspect: str = field(
        default="stretch",
        metadata={"help": "How the stage's image policy resizes: `stretch` (the paper) or `keep` the aspect ratio."},
    )
    chatreid_vision_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the vision encoder (chatreid_projector: and merger), if its own."},
    )
    chatreid_loss: str = field(
        default="tokens",
        metadata={"help": "The loss of a step: the mean over its answer `tokens`, or over its `records`."},
    )
    chatreid_lazy: bool = field(
        default=False,
        metadata={"help": "Tokenize ChatReID records on the fly instead of caching the whole data set first."},
    )

    chatreid_over_cutoff: str = field(
        default="trim",
        metadata={
            "help": "A record over cutoff_len: `trim` leaves out gallery images that are no match, `raise` stops."
        },
    )

    chatreid_bad_image: str = field(
        default="raise",
        metadata={
            "help": "An image that cannot be read: `raise` stops; `skip` trains on the next record instead and lists "
            "the file in chatreid_bad_images.jsonl (needs chatreid_lazy)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dataset: Any = expand_stages(self.dataset, self.dataset_dir)  # type: ignore[arg-type]  # lists by now
        self.eval_dataset: Any = expand_stages(self.eval_dataset, self.dataset_dir, held_out=True)  # type: ignore[arg-type]
        ImagePolicy(self.chatreid_stage, self.chatreid_aspect)  # type: ignore[arg-type]  # it refuses wrong values
        if self.chatreid_projector not in ("encoder", "decoder"):
            raise ConfigError(f"chatreid_projector must be encoder or decoder, not {self.chatreid_projector!r}.")
        if self.chatreid_over_cutoff == "thin":
            raise ConfigError("chatreid_over_cutoff: thin is now called trim; write chatreid_over_cutoff: trim.")
        if self.chatreid_over_cutoff not in OVER_CUTOFF:
            raise ConfigError(f"chatreid_over_cutoff must be trim or raise, not {self.chatreid_over_cutoff!r}.")
        if self.chatreid_loss not in WEIGHTINGS:
            raise ConfigError(f"chatreid_loss must be tokens or records, not {self.chatreid_loss!r}.")
        if self.chatreid_bad_image not in BAD_IMAGE:
            raise ConfigError(f"chatreid_bad_image must be raise or skip, not {self.chatreid_bad_image!r}.")
        if self.chatreid_bad_image == "skip" and not self.chatreid_lazy:
            raise ConfigError(
                "chatreid_bad_image: skip needs chatreid_lazy: true; without it all records are tokenized before an "
                "image is opened, and no other can be drawn. Set chatreid_lazy: true or chatreid_bad_image: raise."
            )
        self.chatreid_vision_learning_rate = parse_rate(self.chatreid_vision_learning_rate)
        if self.chatreid_encoder is not None and self.chatreid_stage not in (None, 2):
            raise ConfigError(
                f"chatreid_encoder is set with chatreid_stage: {self.chatreid_stage}, but the decoder is swapped in "
                "Stage 2 only (paper section 3.3). Remove one of the two keys."
            )
        if self.chatreid_stage is not None and not str(self.template).startswith("chatreid"):
            raise ConfigError(
                f"chatreid_stage: {self.chatreid_stage} needs `template: chatreid`, found template {self.template!r}: "
                "another template would not apply the stage's image policy."
            )


def prepare_training(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Act on the parsed keys: hand the stage to the model loader, compose the swapped checkpoint.

    Every node's first process composes (with ``data_shared_file_system: true``, only the first node's); the others
    wait and then load the same folder.

    Raises:
        ConfigError: the settings are known to crash later, the swap is impossible, or the vision encoder cannot have
            its own learning rate.
        UpstreamError: a hook that the run needs has failed.
    """
    _refuse_failed_hooks(data_args)
    if not training_args.do_train:
        take_recorded_prompt(model_args, data_args)
    setattr(training_args, ATTRIBUTE, find_prompt(data_args))
    refuse_pitfalls(model_args, data_args, training_args, finetuning_args)
    start_trimmed_list(training_args)
    start_bad_image_list(data_args, training_args)
    finetuning_args.chatreid_template = str(data_args.template).startswith("chatreid")
    finetuning_args.chatreid_stage = data_args.chatreid_stage
    finetuning_args.chatreid_projector = data_args.chatreid_projector
    finetuning_args.chatreid_vision_learning_rate = data_args.chatreid_vision_learning_rate
    finetuning_args.chatreid_loss = choose_loss(model_args, data_args, training_args, finetuning_args)
    check_vision_rate(data_args.chatreid_vision_learning_rate, training_args, finetuning_args)
    if data_args.chatreid_encoder is not None and training_args.do_train:
        _swap_decoder(model_args, data_args, training_args)
    check_model(model_args, data_args, training_args.resume_from_checkpoint)


def check_model(model_args: Any, data_args: Any, resumed: Any = None) -> None:
    """Look at what LLaMA-Factory is about to load, which it, transformers and PEFT take as it comes.

    Args:
        model_args: LLaMA-Factory's arguments.
        data_args: the same; with a template that is not ours, the model is not ours to judge.
        resumed: the checkpoint that a run goes on from.

    Raises:
        ConfigError: a checkpoint in a folder here lacks tensors, or an adapter is of another model.
    """
    folder = Path(model_args.model_name_or_path)
    if str(data_args.template).startswith("chatreid") and folder.is_dir() and not model_args.train_from_scratch:
        check_completeness(folder)
    check_adapter_base(model_args, resumed)


def _swap_decoder(model_args: Any, data_args: Any, training_args: Any) -> None:
    output = Path(training_args.output_dir) / COMPOSED_FOLDER
    local = not data_args.data_shared_file_system
    with training_args.main_process_first(local=local, desc="compose the Stage 2 checkpoint"):
        if not (training_args.resume_from_checkpoint and _is_made_from(output, model_args, data_args)):
            compose_checkpoint(
                find_local_checkpoint(data_args.chatreid_encoder, model_args, "chatreid_encoder"),
                find_local_checkpoint(model_args.model_name_or_path, model_args, "model_name_or_path"),
                output,
                data_args.chatreid_projector,
            )
    model_args.model_name_or_path = str(output)


def _is_made_from(output: Path, model_args: Any, data_args: Any) -> bool:
    """Tell whether a run that is resumed started from ``output``; what it was made from need not exist any more."""
    if not (output / MARKER).is_file():
        return False
    wanted = {
        "encoder": data_args.chatreid_encoder,
        "decoder": model_args.model_name_or_path,
        "projector": data_args.chatreid_projector,
    }
    return read_json(output / MARKER).items() >= wanted.items()


def _choose_checkpoint(args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    named = find_named_checkpoint(args)
    if not training_args.do_train or finetuning_args.use_mca:  # Megatron's checkpoints are of another kind
        return
    run = describe_run(data_args, training_args, finetuning_args, bool(named))
    # LLaMA-Factory 0.9.5 forgets a named one in the stages that it cannot resume, with one warning.
    resume = training_args.resume_from_checkpoint or named
    training_args.resume_from_checkpoint = choose_checkpoint(resume, run)


@contextmanager
def explain_refusals(args: Any) -> Generator[None]:
    """Show what LLaMA-Factory and transformers refuse in a recipe of ours as one message, without their tracebacks."""
    values: dict[str, Any] = args if isinstance(args, dict) else {}
    ours = str(values.get("template")).startswith("chatreid") or any(key.startswith("chatreid_") for key in values)
    try:
        yield
    except (ValueError, ImportError) as error:
        if not ours:
            raise
        raise ConfigError(f"LLaMA-Factory refuses the recipe: {error}") from error


def _refuse_failed_hooks(data_args: Any) -> None:
    """Stop a run that uses the plugin while a part of it is not at work; stock runs go on."""
    from .hooks import STATUS  # late: hooks.py imports this module

    used = data_args.chatreid_stage is not None or data_args.chatreid_encoder is not None or data_args.chatreid_lazy
    used = used or data_args.chatreid_vision_learning_rate is not None
    failed = [hook for hook in STATUS.values() if hook.state == "failed"]
    if failed and (used or str(data_args.template).startswith("chatreid")):
        raise UpstreamError("; ".join(f"{h.name} is not at work: {h.reason}" for h in failed))


def extend_parser(module: ModuleType) -> None:
    """Replace DataArguments inside ``llamafactory.hparams.parser`` and act after arguments are parsed."""
    # All checks come first: keys that are known but not acted on would be worse than none.
    stock = get_upstream(module, "DataArguments")
    lists = [get_upstream(module, name) for name in ARGUMENT_LISTS]
    get_train_args = get_function(module, "get_train_args")
    get_infer_args = get_function(module, "get_infer_args")

    @wraps(get_train_args)
    def get_chatreid_train_args(args: Any = None) -> Any:
        with explain_refusals(args):
            parsed = get_train_args(args)
        _choose_checkpoint(args, *parsed[1:4])
        prepare_training(*parsed[:4])
        return parsed

    @wraps(get_infer_args)
    def get_chatreid_infer_args(args: Any = None) -> Any:
        parsed = get_infer_args(args)
        model_args, data_args, finetuning_args, _ = parsed
        finetuning_args.chatreid_stage = data_args.chatreid_stage
        take_recorded_prompt(model_args, data_args)
        check_model(model_args, data_args)
        return parsed

    for classes in lists:
        classes[:] = [ChatReIDDataArguments if item is stock else item for item in classes]
    module.DataArguments = ChatReIDDataArguments  # type: ignore[attr-defined]
    # Pickled under the name that it now has there: a spawned worker that unpickled it from this module would import
    # LLaMA-Factory while this module is half-loaded, and the hook, which needs this module, would fail.
    ChatReIDDataArguments.__module__, ChatReIDDataArguments.__qualname__ = module.__name__, "DataArguments"
    module.get_train_args = get_chatreid_train_args  # type: ignore[attr-defined]
    module.get_infer_args = get_chatreid_infer_args  # type: ignore[attr-defined]

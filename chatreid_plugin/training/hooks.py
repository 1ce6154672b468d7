"""What happens to each LLaMA-Factory module as it finishes loading; called by ``_autoload`` in every process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Literal

from ..errors import ChatReIDError


@dataclass(frozen=True, slots=True)
class HookStatus:
    """One hook as ``chatreid doctor`` shows it."""

    name: str
    target: str
    state: Literal["applied", "pending", "failed"]
    reason: str = ""


STATUS: dict[str, HookStatus] = {}

_NAMES = {
    "llamafactory.hparams.parser": "YAML keys chatreid_* and the decoder swap",
    "llamafactory.data.parser": "image_root of a data set in dataset_info.json",
    "llamafactory.data.mm_plugin": "image policy and header-only token counts",
    "llamafactory.data.converter": "formatting: chatreid",
    "llamafactory.data.template": "template: chatreid",
    "llamafactory.data.collator": "positions of image tokens in generation",
    "llamafactory.data.loader": "chatreid_lazy: tokenize on the fly",
    "llamafactory.model.loader": "check of the trainable parameters, batched vision attention",
    "llamafactory.train.sft.trainer": "resuming, learning rate of the vision encoder",
    "llamafactory.train.tuner": "report of thinned records",
}


def list_hooks() -> list[HookStatus]:
    """Return every hook with its state in this process."""
    return [STATUS.get(target, HookStatus(name, target, "pending")) for target, name in _NAMES.items()]


def _find_hook(module_name: str) -> Callable[[ModuleType], None]:
    # Imported one by one and late: each of these imports the LLaMA-Factory module that has just been loaded.
    if module_name == "llamafactory.hparams.parser":
        from .arguments import extend_parser as hook
    elif module_name == "llamafactory.data.parser":
        from .converter import keep_image_root as hook
    elif module_name == "llamafactory.data.mm_plugin":
        from .mm_plugin import register_plugin as hook
    elif module_name == "llamafactory.data.converter":
        from .converter import register_converter as hook
    elif module_name == "llamafactory.data.template":
        from .templates import register_templates as hook
    elif module_name == "llamafactory.data.collator":
        from .positions import extend_collator as hook
    elif module_name == "llamafactory.data.loader":
        from .lazy import extend_loader as hook
    elif module_name == "llamafactory.train.sft.trainer":
        from .trainer import extend_trainer as hook
    elif module_name == "llamafactory.train.tuner":
        from .thinned import report_thinned as hook
    else:
        from .stages import extend_model_loader as hook
    return hook


def apply(module_name: str, module: ModuleType) -> None:
    """Apply the hook of one LLaMA-Factory module that has just been executed.

    Raises:
        Exception: whatever made the hook fail; ``_autoload`` records it and lets stock LLaMA-Factory go on.
    """
    if module_name not in _NAMES:
        return
    try:
        _find_hook(module_name)(module)
    except Exception as error:
        STATUS[module_name] = HookStatus(
            _NAMES[module_name], module_name, "failed", f"{type(error).__name__}: {error}"
        )
        raise
    STATUS[module_name] = HookStatus(_NAMES[module_name], module_name, "applied")
    _show_user_errors_briefly()


def _close_progress_bars() -> None:
    # An open bar would share the message's line, and be drawn once more below it as the process ends.
    bars = getattr(getattr(sys.modules.get("tqdm.std"), "tqdm", None), "_instances", ())
    for bar in list(bars):
        bar.close()


def _show_user_errors_briefly() -> None:
    """Print our own errors as one message: a user who mistyped a key needs no traceback through LLaMA-Factory."""
    previous = sys.excepthook
    if getattr(previous, "shows_chatreid_errors", False):
        return

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, ChatReIDError):
            # An error from a data loader worker arrives as the worker's whole traceback; the message is its end.
            message = str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()
            _close_progress_bars()
            print(f"chatreid: {kind.__name__}: {message}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    show.shows_chatreid_errors = True  # type: ignore[attr-defined]
    sys.excepthook = show

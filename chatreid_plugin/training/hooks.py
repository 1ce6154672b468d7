"""What happens to each LLaMA-Factory module as it finishes loading; called by ``_autoload`` in every process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Literal

from ..errors import ChatReIDError
from ..printing import say
from .launcher import pass_on_message


@dataclass(frozen=True, slots=True)
class HookStatus:
    """One hook as ``chatreid doctor`` shows it."""

    name: str
    target: str
    state: Literal["applied", "pending", "failed"]
    reason: str = ""


STATUS: dict[str, HookStatus] = {}


@dataclass(frozen=True, slots=True)
class Hook:
    """What is done to one LLaMA-Factory module: what it brings, and the function of this package that does it."""

    name: str
    module: str
    function: str


_HOOKS = {
    "llamafactory.hparams.parser": Hook("YAML keys chatreid_* and the decoder swap", "arguments", "extend_parser"),
    "llamafactory.data.parser": Hook(
        "image_root of a data set in dataset_info.json", "dataset_info", "keep_image_root"
    ),
    "llamafactory.data.mm_plugin": Hook("image policy and header-only token counts", "template", "register_plugin"),
    "llamafactory.data.converter": Hook("formatting: chatreid", "loader", "register_converter"),
    "llamafactory.data.template": Hook("template: chatreid", "template", "register_templates"),
    "llamafactory.data.collator": Hook("positions of image tokens in generation", "loader", "extend_collator"),
    "llamafactory.data.loader": Hook("chatreid_lazy: tokenize on the fly", "loader", "extend_loader"),
    "llamafactory.model.loader": Hook(
        "check of the trainable parameters, batched vision attention", "model", "extend_model_loader"
    ),
    "llamafactory.train.callbacks": Hook("resuming with all weights", "resume", "extend_resuming"),
    "llamafactory.train.sft.trainer": Hook("learning rate of the vision encoder", "trainer", "extend_optimizer"),
    "llamafactory.train.tuner": Hook(
        "report of thinned records, record of the system prompt", "trainer", "extend_tuner"
    ),
    "llamafactory.launcher": Hook("why torchrun stopped, in one line", "launcher", "extend_launcher"),
}


def list_hooks() -> list[HookStatus]:
    """Return every hook with its state in this process."""
    return [STATUS.get(target, HookStatus(hook.name, target, "pending")) for target, hook in _HOOKS.items()]


def _find_hook(module_name: str) -> Callable[[ModuleType], None]:
    # Imported one by one and late: each of these imports the LLaMA-Factory module that has just been loaded.
    hook = _HOOKS[module_name]
    return getattr(import_module(f"{__package__}.{hook.module}"), hook.function)


def apply(module_name: str, module: ModuleType) -> None:
    """Apply the hook of one LLaMA-Factory module that has just been executed.

    Raises:
        Exception: whatever made the hook fail; ``_autoload`` records it and lets stock LLaMA-Factory go on.
    """
    if module_name not in _HOOKS:
        return
    name = _HOOKS[module_name].name
    try:
        _find_hook(module_name)(module)
    except Exception as error:
        STATUS[module_name] = HookStatus(name, module_name, "failed", f"{type(error).__name__}: {error}")
        raise
    STATUS[module_name] = HookStatus(name, module_name, "applied")
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
            say(f"chatreid: {kind.__name__}: {message}", aside=True)
            pass_on_message(f"chatreid: {kind.__name__}: {message}")
        else:
            previous(kind, error, traceback)

    show.shows_chatreid_errors = True  # type: ignore[attr-defined]
    sys.excepthook = show

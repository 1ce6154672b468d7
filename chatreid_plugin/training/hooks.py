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
    """What became of a hook in this process."""

    name: str
    target: str
    state: Literal["applied", "failed"]
    reason: str = ""


# LLaMA-Factory module -> its hook, once the module has been loaded.
STATUS: dict[str, HookStatus] = {}


def _find_hook(function: str) -> Callable[[ModuleType], None]:
    # Imported one by one and late: each of these imports the LLaMA-Factory module that has just been loaded.
    file, _, name = function.partition(".")
    return getattr(import_module(f"{__package__}.{file}"), name)


def apply(target: str, module: ModuleType, name: str, function: str) -> None:
    """Apply the hook of one LLaMA-Factory module that has just been executed.

    Args:
        target: the module's name.
        module: the module.
        name: what the hook brings; this and ``function`` are the entry of ``_autoload.TARGETS``.
        function: what does it, as FILE.FUNCTION of this package.

    Raises:
        Exception: whatever made the hook fail; ``_autoload`` records it and lets stock LLaMA-Factory go on.
    """
    try:
        _find_hook(function)(module)
    except Exception as error:
        STATUS[target] = HookStatus(name, target, "failed", f"{type(error).__name__}: {error}")
        raise
    STATUS[target] = HookStatus(name, target, "applied")
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

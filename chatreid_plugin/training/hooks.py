"""What happens to each LLaMA-Factory module as it finishes loading; called by ``_autoload`` in every process.

The user's own errors are printed as one message. Under torchrun they go from the processes that it starts to the
command that the user typed through a file, and are the last lines there.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Literal

from ..errors import ChatReIDError, ConfigError
from ..printing import make_printable, say
from ..upstream import get_upstream
from .compat import get_function


@dataclass(frozen=True, slots=True)
class HookStatus:
    """What became of a hook in this process."""

    name: str
    target: str
    state: Literal["applied", "failed"]
    reason: str = ""


# Names a file; the environment is what torchrun hands on to its processes.
MESSAGES_VARIABLE = "CHATREID_MESSAGES"
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


def pass_on_message(message: str) -> None:
    """Write down a message for the command that started torchrun; nothing where there is none."""
    path = os.environ.get(MESSAGES_VARIABLE)
    if not path or not Path(path).parent.is_dir():
        return
    # One short write at the end of the file: lines of several processes do not mix (POSIX, O_APPEND).
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(make_printable(message).replace("\n", "\v") + "\n")


def read_messages(path: Path) -> list[str]:
    """Return the different messages of all processes in the order they came."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [line.replace("\v", "\n") for line in dict.fromkeys(lines) if line]


def refuse_no_process() -> None:
    """Refuse torchrun with a process for each of no GPUs; it stops with a failed assertion.

    Raises:
        ConfigError: says what to set on a CPU.
    """
    import llamafactory.extras.misc as module

    is_enabled, count = get_upstream(module, "is_env_enabled"), get_upstream(module, "get_device_count")
    if is_enabled("FORCE_TORCHRUN") and "NPROC_PER_NODE" not in os.environ and count() == 0:
        raise ConfigError(
            "FORCE_TORCHRUN=1 starts a process for each GPU, and there is none here. Leave it out and add "
            "deepspeed=null bf16=false to train on the CPU, or set NPROC_PER_NODE to a number of processes."
        )


def extend_launcher(module: ModuleType) -> None:
    """Wrap ``launch`` of ``llamafactory.launcher``, the command that the user typed."""
    launch = get_function(module, "launch")

    @wraps(launch)
    def launch_and_explain() -> None:
        if sys.argv[1:2] != ["train"]:
            launch()
            return
        refuse_no_process()
        with tempfile.TemporaryDirectory(prefix="chatreid_") as folder:
            messages = Path(folder) / "messages"
            os.environ[MESSAGES_VARIABLE] = str(messages)
            try:
                launch()
            except subprocess.CalledProcessError as error:
                found = read_messages(messages)
                if not found:
                    raise
                say("\n".join(found), aside=True)
                sys.exit(error.returncode)

    module.launch = launch_and_explain  # type: ignore[attr-defined]

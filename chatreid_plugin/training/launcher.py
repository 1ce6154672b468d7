"""``llamafactory-cli train`` under torchrun: what went wrong is the last line, no traceback.

Our messages go from the processes that torchrun starts to the command that the user typed through a file.
"""

import os
import subprocess
import sys
import tempfile
from functools import wraps
from pathlib import Path
from types import ModuleType

from ..errors import ConfigError
from ..printing import make_printable, say
from ..upstream import get_upstream
from .compat import get_function


# Names a file; the environment is what torchrun hands on to its processes.
VARIABLE = "CHATREID_MESSAGES"


def pass_on_message(message: str) -> None:
    """Write down a message for the command that started torchrun; nothing where there is none."""
    path = os.environ.get(VARIABLE)
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
            os.environ[VARIABLE] = str(messages)
            try:
                launch()
            except subprocess.CalledProcessError as error:
                found = read_messages(messages)
                if not found:
                    raise
                say("\n".join(found), aside=True)
                sys.exit(error.returncode)

    module.launch = launch_and_explain  # type: ignore[attr-defined]

"""``llamafactory-cli train`` under torchrun: what went wrong is the last line, no traceback."""

import os
import subprocess
import sys
import tempfile
from functools import wraps
from pathlib import Path
from types import ModuleType

from ..errors import ConfigError
from ..printing import say
from ..upstream import get_upstream
from .compat import get_function
from .messages import VARIABLE, read_messages


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

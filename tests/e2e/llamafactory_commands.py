"""Run several ``llamafactory-cli`` commands, each in a process of its own that need not import LLaMA-Factory again.

``python llamafactory_commands.py COMMANDS.json LOGS``: a list of [folder, arguments] in, a log for each and
``codes.json`` with the exit codes out.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path


def run_forked(folder: str, arguments: list[str], log: Path) -> int:
    """Run one command in a fork, as its own interpreter would: an error that nobody catches ends in sys.excepthook."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.argv = ["llamafactory-cli", *arguments]
    from llamafactory.cli import main

    main()
    sys.exit(0)


def import_what_takes_time() -> None:
    """Load what a training would, half of its time on a tiny model, so that the forks find it loaded."""
    import llamafactory.train.tuner  # noqa: F401
    from transformers import AutoModelForImageTextToText

    list(AutoModelForImageTextToText._model_mapping.keys())  # loads the configurations of all families
    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")  # as accelerate does


if __name__ == "__main__":
    import_what_takes_time()

    logs = Path(sys.argv[2])
    commands = json.loads(Path(sys.argv[1]).read_text())
    codes = [run_forked(*command, logs / f"{number}.log") for number, command in enumerate(commands)]
    (logs / "codes.json").write_text(json.dumps(codes))

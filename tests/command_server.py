"""Run commands in forks of one process that has imported what takes the time: LLaMA-Factory, transformers, torch.

``python command_server.py`` reads a line of JSON for each command, ``{"command": [...], "cwd", "env", "stdout",
"stderr", "timeout"}``, and prints its exit code once it has ended. A command is ``llamafactory-cli ...`` or
``python -m module ...``; its environment must not change what is read on import, such as ``OMP_NUM_THREADS``.
"""

import importlib.util
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any


def run_forked(job: dict[str, Any]) -> int:
    """Run one command in a fork, as its own interpreter would: an error that nobody catches ends in sys.excepthook."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(job["timeout"])
    with open(os.devnull) as nothing, open(job["stdout"], "wb") as output, open(job["stderr"], "wb") as errors:
        for number, file in enumerate((nothing, output, errors)):
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    program, *arguments = job["command"]
    if Path(program).name == "llamafactory-cli":
        sys.argv = [program, *arguments]
        from llamafactory.cli import main

        main()
    else:
        assert arguments[0] == "-m", job["command"]
        sys.argv = arguments[1:]
        # `python -m` has the folder it runs in on its path; here it is the folder of this script.
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    sys.exit(0)


def import_what_takes_time() -> None:
    """Load what a training or an evaluation would, half of its time on a tiny model, so that the forks find it."""
    import llamafactory.train.tuner  # noqa: F401
    from transformers import AutoModelForImageTextToText

    import chatreid_plugin.eval.pipeline  # noqa: F401

    list(AutoModelForImageTextToText._model_mapping.keys())  # loads the configurations of all families
    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")  # as accelerate does


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported may print
    import_what_takes_time()
    for line in sys.stdin:
        print(run_forked(json.loads(line)), file=answers, flush=True)

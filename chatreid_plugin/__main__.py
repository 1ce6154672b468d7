"""``python -m chatreid_plugin``: the command line, and LLaMA-Factory's own where ``.pth`` files are not processed.

After ``pip install``, use ``llamafactory-cli``. An installation by ``--target`` or PYTHONPATH has no ``.pth`` at work;
``python -m chatreid_plugin train X.yaml`` then installs the hooks itself, in this process and in every process that
torchrun starts. Ray workers and spawned data workers start from neither: they need the ``pip install``.
"""

import inspect
import os
import shutil
import sys
import sysconfig

from . import _autoload, cli
from .errors import ChatReIDError, UpstreamError


# LLaMA-Factory's commands that need our YAML keys or templates; none of them is also a command of `chatreid`.
LLAMAFACTORY_COMMANDS = ("train", "export", "chat", "api", "webchat", "webui")
WORKER_COMMAND = "train-worker"


def main() -> None:
    """Run LLaMA-Factory's command with the hooks installed, or else the ``chatreid`` command line."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        if command in LLAMAFACTORY_COMMANDS:
            _autoload.install()
            _run_llamafactory()
        elif command == WORKER_COMMAND:
            _autoload.install()
            _run_worker()
        else:
            cli.main()
    except ChatReIDError as error:
        cli.exit_with(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _run_llamafactory() -> None:
    from llamafactory import launcher
    from llamafactory.cli import main as run_cli

    # For several GPUs the launcher runs `torchrun ... {its own file} {arguments}` as one string cut at the spaces, so
    # what stands for its file may as well be `-m chatreid_plugin train-worker`: the children then have the hooks too.
    # Below our own hook, which wraps it.
    if "__file__" not in inspect.unwrap(launcher.launch).__code__.co_names:
        raise UpstreamError(
            "This version of LLaMA-Factory starts torchrun in a way that `python -m chatreid_plugin` does not know. "
            "Install chatreid-plugin with pip into the environment and use llamafactory-cli."
        )
    launcher.__file__ = f"-m chatreid_plugin {WORKER_COMMAND}"
    _prefer_own_torchrun()
    run_cli()


def _prefer_own_torchrun() -> None:
    # The launcher takes torchrun from PATH; without an activated environment that may be another environment's.
    scripts = sysconfig.get_path("scripts")
    if shutil.which("torchrun", path=scripts):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])


def _run_worker() -> None:
    from llamafactory.train.tuner import run_exp

    del sys.argv[1]
    run_exp()


if __name__ == "__main__":
    main()

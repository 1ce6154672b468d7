"""A Python that starts in no time: its programs run in forks of one process that has imported what takes the time.

``python command_server.py SOCKET`` imports LLaMA-Factory, transformers and torch, then listens. What ``write_python``
writes takes the place of ``python``: it hands its arguments, folder, environment and open files to the server, passes
signals on and ends as its program does. It knows ``python -m module ...`` and ``python script ...``; the environment
must not change what is read on import, such as ``OMP_NUM_THREADS``.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import psutil


# -S: without the hook of the plugin, which the server has; it only talks over a socket.
CLIENT = """#!{python} -SE
import json, os, signal, socket, struct, sys

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
job = json.dumps({{"arguments": {arguments!r} + sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}).encode()
socket.send_fds(server, [struct.pack("!I", len(job))], [0, 1, 2])
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
server.sendall(job)
code = struct.unpack("!i", server.recv(4) or struct.pack("!i", 70))[0]
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def write_python(path: Path, address: Path, arguments: tuple[str, ...] = ()) -> None:
    """Write an executable that runs ``python ARGUMENTS ...`` in a fork of the server listening at ``address``."""
    text = CLIENT.format(python=sys.executable, address=str(address), arguments=list(arguments))
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def run_program(job: dict[str, Any]) -> None:
    """Run a module or a script in this process, as an interpreter of its own would."""
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    arguments: list[str] = [argument for argument in job["arguments"] if argument != "-u"]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        # `python -m` has the folder it runs in on its path; here it is the folder of this script.
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


def receive_job(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    header, files, _, _ = socket.recv_fds(connection, 4, 3)
    (size,) = struct.unpack("!I", header)
    text = b""
    while len(text) < size:
        text += connection.recv(size - len(text))
    return json.loads(text), files


def serve_one(connection: socket.socket) -> None:
    """Run the client's program in a fork of this process, pass the client's signals on, answer with its exit code.

    An error that nobody catches ends in sys.excepthook, as in an interpreter of its own.
    """
    job, files = receive_job(connection)
    program = os.fork()
    if not program:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        run_program(job)
        sys.exit(0)
    ended = os.pidfd_open(program)
    while ended not in select.select([ended, connection], [], [])[0]:
        asked = connection.recv(1)
        if not asked:  # the client was killed: torchrun's clients, too
            for process in [*psutil.Process(program).children(recursive=True), psutil.Process(program)]:
                process.kill()
            break
        os.kill(program, asked[0])
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(struct.pack("!i", code))
    os._exit(0)


def import_what_takes_time() -> None:
    """Load what a training or an evaluation would, half of its time on a tiny model, so that the forks find it."""
    import llamafactory.train.tuner  # noqa: F401
    from transformers import AutoModelForImageTextToText

    import chatreid_plugin.eval.run  # noqa: F401

    list(AutoModelForImageTextToText._model_mapping.keys())  # loads the configurations of all families
    if importlib.util.find_spec("deepspeed"):
        communication: Any = importlib.import_module("deepspeed.comm.torch")
        # A faster way between processes of a CPU, compiled for a minute on a new machine; gloo does as well.
        communication.build_shm_op = lambda: None


if __name__ == "__main__":
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    import_what_takes_time()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who serve
    while True:
        client, _ = listener.accept()
        if not os.fork():
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            serve_one(client)
        client.close()

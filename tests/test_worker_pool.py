"""Tests of chatreid_plugin.worker_pool: why workers end, in the user's words."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatreid_plugin.errors import DataError
from chatreid_plugin.worker_pool import open_pool


SCRIPT = """
import os
from chatreid_plugin.worker_pool import open_pool

with open_pool(2) as pool:
    print(pool.submit(os.getpid).result())
"""


PARENT = """
import os
import time
from chatreid_plugin.worker_pool import open_pool

if __name__ == "__main__":
    with open_pool(2) as pool:
        print(*[pool.submit(os.getpid).result() for _ in range(2)], flush=True)
        time.sleep(100)
"""


def is_running(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def end_process(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("chatreid_plugin.errors.ConfigError: The worker processes ended as soon as they")
    assert 'below `if __name__ == "__main__":`' in last


def test_killed_worker_is_called_killed() -> None:
    with pytest.raises(DataError, match="A worker process was killed, most likely for want of memory"):
        with open_pool(1) as pool:
            list(pool.map(abs, [1]))
            list(pool.map(end_process, [1]))


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """They would wait for work for ever."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = {int(process) for process in parent.stdout.readline().split()}
        assert workers and all(map(is_running, workers))
        parent.kill()
        # The pipe closes when the last process that holds it has ended.
        parent.stdout.read()
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))

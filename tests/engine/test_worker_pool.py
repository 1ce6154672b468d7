"""Tests of chatreid_plugin.engine.worker_pool: why workers end, in the user's words."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chatreid_plugin.engine.worker_pool import open_pool
from chatreid_plugin.errors import DataError


SCRIPT = """
import os
from chatreid_plugin.engine.worker_pool import open_pool

with open_pool(2) as pool:
    print(pool.submit(os.getpid).result())
"""


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

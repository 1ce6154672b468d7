"""Interpreter start with and without the plugin's .pth file, in two empty environments, run in turn.

python tests/bench/bench_startup.py [RUNS]
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def make_environment(folder: Path, with_plugin: bool) -> Path:
    """Make an empty environment, with or without the package and its .pth file; return its interpreter."""
    venv.create(folder, with_pip=False)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    if with_plugin:
        shutil.copytree(ROOT / "chatreid_plugin", site_packages / "chatreid_plugin")
        shutil.copy(ROOT / "chatreid_plugin" / "autoload" / "chatreid_autoload.pth", site_packages)
    return folder / "bin" / "python"


def time_start(interpreter: Path) -> float:
    """Return the milliseconds of one ``python -c pass``."""
    started = time.perf_counter()
    subprocess.run([interpreter, "-c", "pass"], check=True)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Print the medians and their difference."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder:
        interpreters = [make_environment(Path(folder) / str(i), with_plugin=bool(i)) for i in (0, 1)]
        for interpreter in interpreters:
            time_start(interpreter)
        times = [[time_start(interpreter) for interpreter in interpreters] for _ in range(runs)]
    without, with_plugin = (statistics.median(column) for column in zip(*times, strict=True))
    difference = with_plugin - without
    print(f"{runs} runs: {without:.2f} ms without, {with_plugin:.2f} ms with the plugin, {difference:+.2f} ms")


if __name__ == "__main__":
    main()

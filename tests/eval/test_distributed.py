"""Real evaluations of a tiny Qwen2-VL in two processes, on one disk or each on its own, against one process."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.errors import ChatReIDError
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from tests.support import alter


ParseLayout = Callable[[str], Path]
RunCommand = Callable[..., subprocess.CompletedProcess[str]]

# The evaluator, once in each folder: `python driver.py CONFIG.yaml FOLDER ...`. With {rank} each process has its own,
# as machines with disks of their own do; with {after_loss} the first one's is new, the second one's the same again.
DRIVER = """
import os, sys
from pathlib import Path
from chatreid_plugin.config import load_settings
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.distributed import join_processes
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.distributed import join_processes
from chatreid_plugin.eval.settings import EvalSettings

with join_processes() as processes:
    for folder in sys.argv[2:]:
        folder = folder.format(rank=processes.rank, after_loss=(2, 1)[processes.rank])
        os.makedirs(folder, exist_ok=True)
        os.chdir(folder)
        run_evaluation(load_settings(Path(sys.argv[1]), [], EvalSettings), processes)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FILES = ("results.json", "rankings.parquet", "report.html")


@pytest.fixture(scope="module")
def command(parse_layout: ParseLayout, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the driver and the configuration of an evaluation of a few queries."""
    folder = tmp_path_factory.mktemp("driver")
    driver, config = folder / "driver.py", folder / "config.yaml"
    driver.write_text(DRIVER)
    data = f"benchmark: market1501, manifest: {parse_layout('market1501')}, max_queries: 6"
    lines = [f"data: {{{data}}}", f"model: {{model_name_or_path: {checkpoint}, device: cpu}}"]
    lines += ["filter: {source: colour, top_k: 5, floor: 0}", "output: {report_queries: 2, output_dir: out}"]
    config.write_text("\n".join(lines))
    return [str(driver), str(config)]


def run(run_command: RunCommand, command: list[str], *folders: Path | str) -> str:
    """Run the driver; return what it logged."""
    done = run_command([sys.executable, *command, *map(str, folders)])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def read_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "out" / name).read_bytes() for name in FILES}


def count_scored(folder: Path) -> int:
    (path,) = (folder / "out").glob("scores-*.jsonl")
    return path.read_bytes().count(b"\n") - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "do not score alike: they differ in seed"),
        ({"max_queries": 2}, "do not have the same queries and candidates"),
    ],
)
def test_machines_that_do_not_agree_are_refused(
    make_world: Callable[..., Path],
    make_settings: Callable[..., EvalSettings],
    run_together: Callable[..., list[Any]],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    first = make_settings(make_world(), backend="random", output_dir=tmp_path / "disk0")
    second = alter(first, {"output_dir": tmp_path / "disk1", **changes})
    with pytest.raises(ChatReIDError, match=message):
        run_together([partial(run_evaluation, one) for one in (first, second)])
    assert not (tmp_path / "disk0" / "results.json").exists()


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one_with_one_disk_or_two(
    run_command: RunCommand, command: list[str], tmp_path: Path
) -> None:
    run(run_command, command, tmp_path / "one")
    folders = [str(tmp_path / name) for name in ("together", "disk{rank}", "disk{after_loss}")]
    logged = run(run_command, [*TORCHRUN, *command], *folders)
    whole = read_files(tmp_path / "one")
    for name in ("together", "disk0", "disk2"):
        assert read_files(tmp_path / name) == whole, name
        assert count_scored(tmp_path / name) == 6, name
    assert not (tmp_path / "disk1" / "out" / "results.json").exists()
    # What the second one had finished was not asked for again when the first one's disk was lost.
    assert logged.count("3 of 6 queries were scored before") == 1

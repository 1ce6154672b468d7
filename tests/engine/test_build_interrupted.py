"""Tests of chatreid_plugin.engine.build: builds by the command line that are killed, or that fill the disk, go on."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from chatreid_plugin.config import BuildSettings, load_settings
from chatreid_plugin.engine.manifests import describe_origin, find_manifest
from chatreid_plugin.locks import LOCK_NAME
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import write_manifest


# Enough for two worker processes in every resumed run, too many for the runs that are killed.
RECORDS, RECORDS_PER_SHARD = 80_000, 1000
# Seconds in which the workers of a killed run have to end, on a machine that is busy.
PATIENCE = 5.0
TIMEOUT = 120

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path, make_images: Callable[..., list[ImageRecord]]) -> Path:
    """Write a manifest of 300 images, no files needed, and a recipe that reads it."""
    path = tmp_path / "recipe.yaml"
    values = {
        "sources": [{"name": "own", "root": str(tmp_path / "images")}],
        "manifest_dir": str(tmp_path / "manifests"),
        "output_dir": str(tmp_path / "out"),
        "records": {"stage2": RECORDS},
        "records_per_shard": RECORDS_PER_SHARD,
        "workers": 2,
    }
    path.write_text(yaml.safe_dump(values))
    settings = load_settings(path, [], BuildSettings)
    source = settings.sources[0]
    records = make_images(people=25, cameras=4, images=3)
    write_manifest(find_manifest(settings, source.name), records, source.root, describe_origin(source))
    return path


def start(recipe: Path, *overrides: str, largest_file: int | None = None) -> subprocess.Popen[str]:
    """Start ``chatreid build``; no file may grow above ``largest_file`` bytes, as if the disk were full."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    command = [sys.executable, "-m", "chatreid_plugin", "build", str(recipe), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=limit
    )


def run(recipe: Path, *overrides: str, largest_file: int | None = None) -> tuple[int, str]:
    """Run ``chatreid build``; return its exit code and what it printed on stderr, progress bars left out."""
    process = start(recipe, *overrides, largest_file=largest_file)
    _, errors = process.communicate(timeout=TIMEOUT)
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line and not line.startswith("records:")]
    return process.returncode, "\n".join(lines)


def list_children(process: int) -> list[int]:
    """Return the process ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_alive(process: int) -> bool:
    """Return whether a process still runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether the condition came true within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


def list_shards(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}


def count_shards(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("[0-9]*.parquet"))


def list_temporary_files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name != LOCK_NAME]


def test_build_killed_at_four_random_moments_ends_with_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    output = tmp_path / "out"
    while_writing = 0
    for number in range(4):
        process = start(recipe)
        # While images are read, workers start or the first shards are written; or else in the midst of writing.
        seconds = TIMEOUT if number % 2 else rng.uniform(0.2, 2.0)
        goal = count_shards(output) + rng.randint(1, 8)
        reached = wait_until(lambda goal=goal: count_shards(output) >= goal, seconds)
        time.sleep(rng.uniform(0, 0.1))
        children = list_children(process.pid)
        process.kill()
        assert process.wait(TIMEOUT) == -signal.SIGKILL
        assert wait_until(lambda children=children: not any(map(is_alive, children)), PATIENCE)
        process.communicate(timeout=TIMEOUT)
        while_writing += reached and len(children) > 2
    assert while_writing >= 2

    code, errors = run(recipe)
    assert (code, errors) == (0, "")
    assert list_temporary_files(tmp_path) == []
    # The uninterrupted run, by one process.
    assert run(recipe, f"output_dir={tmp_path}/whole", "workers=1") == (0, "")
    assert list_shards(output) == list_shards(tmp_path / "whole")


def test_killed_worker_is_one_error_and_the_build_goes_on(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe)
    assert wait_until(lambda: count_shards(tmp_path / "out") > 2, TIMEOUT)
    # Beside the two workers there is Python's tracker of resources.
    workers = [
        p for p in list_children(process.pid) if "resource_tracker" not in Path(f"/proc/{p}/cmdline").read_text()
    ]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 3
    message = errors.replace("\r", "\n").splitlines()[-1]
    assert message.startswith("chatreid: A worker process was killed") and message.endswith(
        "with fewer `workers`; what was finished is kept."
    )
    assert "Traceback" not in errors
    kept = list_shards(tmp_path / "out")
    assert run(recipe) == (0, "")
    assert kept.items() <= list_shards(tmp_path / "out").items()
    assert list_temporary_files(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_one_error_and_the_build_goes_on(recipe: Path, tmp_path: Path, workers: int) -> None:
    # Shards of galleries are the largest; those of pairs come first and still fit.
    records = {1: 20_000, 2: 40_000}[workers]  # two workers are not started for few
    overrides = [f"records.stage2={records}", f"records_per_shard={records // 4}", f"workers={workers}"]
    assert run(recipe, *overrides, f"output_dir={tmp_path}/whole") == (0, "")
    whole = list_shards(tmp_path / "whole")
    code, errors = run(recipe, *overrides, largest_file=max(map(len, whole.values())) - 1)
    assert code == 3
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"chatreid: {tmp_path}/out/") and "cannot be written: [Errno 27]" in errors
    assert errors.endswith("Make room or check the permissions, then run again.")
    kept = list_shards(tmp_path / "out")
    assert kept and kept.items() < whole.items()
    assert list_temporary_files(tmp_path) == []
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept}
    assert run(recipe, *overrides) == (0, "")
    assert list_shards(tmp_path / "out") == whole
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == times


@pytest.mark.parametrize("largest_file", [0, 1000])
def test_disk_full_from_the_start_is_one_error(recipe: Path, tmp_path: Path, largest_file: int) -> None:
    # Nothing at all fits, or provenance does but not the images that the workers share.
    code, errors = run(recipe, "workers=1", largest_file=largest_file)
    assert code == 3
    assert len(errors.splitlines()) == 1
    assert "cannot be written: [Errno 27]" in errors
    assert list_temporary_files(tmp_path) == []

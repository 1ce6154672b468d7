"""Tests of chatreid_plugin.engine.executors: the same bytes from everyone, and errors that reach the user."""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine import executors, runner
from chatreid_plugin.engine.executors import SMALLEST_PARALLEL, needs_processes, open_workers
from chatreid_plugin.engine.runner import build_datasets
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.locks import LOCK_NAME


MakeRecipe = Callable[..., BuildSettings]


def list_shards(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}


@pytest.fixture
def in_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let builds of any size be worth a pool of processes."""
    monkeypatch.setattr(executors, "SMALLEST_PARALLEL", 0)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start Ray on this machine, small, and see that nothing of it stays."""
    # Ray writes a token into the home folder and tells its makers about its use, unless told otherwise.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import ray

    # Not in tmp_path: the names of sockets are short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            yield ray
        finally:
            ray.shutdown()
    assert not ray.is_initialized()
    assert not Path(folder).exists()
    # Ray's store of objects.
    assert not [path.name for path in Path("/dev/shm").glob("plasma*")]


def test_pool_writes_the_same_bytes_as_this_process(make_recipe: MakeRecipe, tmp_path: Path, in_pool: None) -> None:
    alone = build_datasets(make_recipe(output_dir=tmp_path / "alone"))
    shared = build_datasets(make_recipe(output_dir=tmp_path / "shared", workers=2))
    assert shared.datasets == alone.datasets
    assert list_shards(tmp_path / "shared") == list_shards(tmp_path / "alone") != {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"workers": 1}, False),
        ({"records": {"stage1": SMALLEST_PARALLEL - 2, "stage2": 1}}, False),
        ({"executor": "ray"}, False),
    ],
)
def test_processes_are_for_large_builds_on_this_machine(
    make_recipe: MakeRecipe, changes: dict[str, Any], expected: bool
) -> None:
    large = {"workers": 2, "records": {"stage1": SMALLEST_PARALLEL - 1, "stage2": 1}}
    assert needs_processes(make_recipe(**(large | changes))) == expected


def test_small_builds_start_no_processes(make_recipe: MakeRecipe) -> None:
    with open_workers(make_recipe(workers=2)) as pool:
        assert pool is None
        assert multiprocessing.active_children() == []


def test_processes_start_at_once_and_end_with_the_build(make_recipe: MakeRecipe, in_pool: None) -> None:
    with open_workers(make_recipe(workers=2)) as pool:
        assert pool is not None
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


def test_dry_run_starts_no_processes(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, in_pool: None) -> None:
    monkeypatch.setattr(runner, "open_workers", lambda *rest: pytest.fail("processes were started"))
    assert build_datasets(make_recipe(workers=2), dry_run=True).datasets


def test_error_in_a_worker_is_the_users_error(make_recipe: MakeRecipe, in_pool: None) -> None:
    recipe = make_recipe(workers=2, cutoff_len=270, records={"stage1": 40})
    with pytest.raises(DataError, match=r"Record chatreid_stage1_image_captioning-00000000\d\d: .* cutoff_len 270"):
        build_datasets(recipe)
    assert list_shards(recipe.output_dir) == {}
    left = {path.name for path in recipe.output_dir.iterdir()} - {LOCK_NAME}
    assert left == {"chatreid_stage1_image_captioning.json"}


def test_ray_that_is_not_installed_is_named(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"executor: ray needs Ray: pip install 'chatreid-plugin\[cluster\]'"):
        build_datasets(make_recipe(executor="ray"))


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ray_writes_the_same_bytes_as_this_process(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray: Any
) -> None:
    # Relative folders are the user's, wherever Ray's workers run.
    monkeypatch.chdir(tmp_path)
    alone = build_datasets(make_recipe(output_dir="alone"))
    spread = build_datasets(make_recipe(output_dir="spread", executor="ray"))
    assert spread.datasets == alone.datasets
    assert list_shards(tmp_path / "spread") == list_shards(tmp_path / "alone") != {}
    assert build_datasets(make_recipe(output_dir="spread", executor="ray")).reused == list(alone.datasets)
    with pytest.raises(DataError) as error:
        build_datasets(make_recipe(output_dir="refused", executor="ray", cutoff_len=270))
    assert type(error.value) is DataError
    assert "\n" not in str(error.value) and "do not fit cutoff_len 270" in str(error.value)
    assert list_shards(tmp_path / "refused") == {}

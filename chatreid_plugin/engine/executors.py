"""Where shards are written: in this process, in a pool of processes, or on a Ray cluster; the bytes are the same."""

import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import Any

from ..config import BuildSettings
from ..errors import ConfigError, DataError
from ..worker_pool import open_pool
from .shard_jobs import ShardJob, write_shard_job


# Below this many records starting processes takes longer than they save.
SMALLEST_PARALLEL = 30_000
# Jobs handed to Ray per core: enough to keep it busy, few enough that an error stops the rest.
_JOBS_PER_CORE = 2


def needs_processes(settings: BuildSettings) -> bool:
    """Return whether the recipe is worth processes of its own on this machine."""
    records = sum(settings.records.values())
    return settings.executor == "local" and settings.count_workers() > 1 and records >= SMALLEST_PARALLEL


@contextmanager
def open_workers(settings: BuildSettings) -> Generator[ProcessPoolExecutor | None, None, None]:
    """Start the worker processes, which load their modules while the sources are read; None if none are needed."""
    if not needs_processes(settings):
        yield None
        return
    with open_pool(settings.count_workers()) as pool:
        yield pool


def run_jobs(
    jobs: Sequence[ShardJob], settings: BuildSettings, pool: ProcessPoolExecutor | None
) -> Generator[ShardJob, None, None]:
    """Write all shards and yield each job when its file is there, in whatever order.

    Args:
        jobs: the shards.
        settings: the recipe.
        pool: from ``open_workers``; without one, shards are written in this process or on Ray.

    Raises:
        ConfigError: ``executor: ray`` without Ray.
        DataError: a job failed; the others that had started are finished, none is begun.
    """
    if settings.executor == "ray":
        yield from _run_on_ray(jobs)
    elif pool is not None:
        yield from _run_in_pool(jobs, pool)
    else:
        yield from map(write_shard_job, jobs)


def _run_in_pool(jobs: Sequence[ShardJob], pool: ProcessPoolExecutor) -> Iterator[ShardJob]:
    for future in as_completed([pool.submit(write_shard_job, job) for job in jobs]):
        yield future.result()


def _run_on_ray(jobs: Sequence[ShardJob]) -> Iterator[ShardJob]:
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError:
        raise ConfigError("executor: ray needs Ray: pip install 'chatreid-plugin[cluster]'.") from None
    if not ray.is_initialized():
        # Ray reports its usage to its makers unless told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # RAY_ADDRESS names a running cluster; without it, Ray starts on this machine.
        ray.init(log_to_driver=False)
    write = ray.remote(num_cpus=1, max_retries=3)(write_shard_job)
    waiting = list(reversed(jobs))
    running: list[Any] = []
    room = _JOBS_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
    try:
        while waiting or running:
            while waiting and len(running) < room:
                running.append(write.remote(waiting.pop()))
            done, running = ray.wait(running)
            yield ray.get(done[0])
    except RayTaskError as error:
        # Without Ray's copy of the traceback.
        raise error.cause from None
    except RayError as error:
        raise DataError(
            f"Ray lost a worker ({type(error).__name__}), most likely for want of memory. Finished shards are kept: "
            "run again."
        ) from None
    finally:
        for job in running:
            # Ray prints errors that nobody asks for.
            with suppress(RayError):
                ray.get(job)

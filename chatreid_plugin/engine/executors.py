"""One shard is one job: its bytes depend on the recipe, the images and its number alone, never on who writes it.

It is drawn, assembled and written in this process, in a pool of processes, or on a Ray cluster.
"""

import os
import random
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ..config import BuildSettings, Change, SourceSettings
from ..datasets.catalog import read_catalog
from ..errors import ConfigError, DataError
from ..images import ImagePolicy
from ..records import INSTRUCTION_SCHEMA
from ..shards import pc, write_table
from ..tasks import OWN_VARIANT, TASKS
from ..worker_pool import open_pool
from .builders import build_draft, explain_missing
from .pool import Draft, ImageTable, open_image_table, pick
from .sampler import ImagePool


# Below this many records starting processes takes longer than they save.
SMALLEST_PARALLEL = 30_000
# Jobs handed to Ray per core: enough to keep it busy, few enough that an error stops the rest.
_JOBS_PER_CORE = 2


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One shard to write.

    Attributes:
        table: the file of ``write_image_table``.
        digest: of the table's content.
        settings: the recipe.
        task: a name of ``tasks.TASKS``.
        stage: the one that trains these records.
        name: of the data set.
        shard: number, from 0.
        count: records in it.
        path: the file to write.
    """

    table: Path
    digest: str
    settings: BuildSettings
    task: str
    stage: int
    name: str
    shard: int
    count: int
    path: Path


@dataclass(frozen=True, slots=True)
class PlacedDraft:
    """A draft with the row of its pool's first image and the number of its wording."""

    draft: Draft
    first_row: int
    variant: int


def index_sources(table: ImageTable) -> list[ImagePool]:
    """Return a pool for each source of the table, tokens not counted yet."""
    return [ImagePool(table, rows) for rows in table.sources]


# In what matches differ, by a data set's setting in the catalogue; "any" are folders and lists of a user's own, whose
# labels say what there is. Visible-infrared benchmarks ask across modalities only, and the paper credits its gains
# there to Stage 2 (section 4.2). The shares are ours.
_SAME_CLOTHES: dict[Change, float] = {"camera": 1.0}
SETTING_CHANGES: dict[str, dict[Change, float]] = {
    "cloth-changing": {"camera": 0.5, "clothes": 0.5},
    "visible-infrared": {"camera": 0.3, "modality": 0.7},
    "any": {"camera": 1.0, "clothes": 1.0, "modality": 1.0},
}


def choose_changes(source: SourceSettings) -> dict[Change, float]:
    """Return in what the matches of a source's pairs differ from the query: its own shares, or its setting's."""
    entry = read_catalog().get(source.parser_name)
    return source.change or SETTING_CHANGES.get(entry.setting if entry else "any", _SAME_CLOTHES)


def choose_pools(pools: Sequence[ImagePool], settings: BuildSettings, stage: int) -> list[ImagePool]:
    """Return the pools of the sources that train a stage, with what their matches differ in."""
    trained = {source.name: source for source in settings.sources if stage in source.stages}
    return [pool.with_changes(choose_changes(trained[pool.name])) for pool in pools if pool.name in trained]


def select_pools(pools: Sequence[ImagePool], settings: BuildSettings, stage: int) -> list[ImagePool]:
    """Return the pools of the sources that train a stage, tokens counted under its policy."""
    return [pool.count_under(ImagePolicy(stage)) for pool in choose_pools(pools, settings, stage)]


@lru_cache(maxsize=1)
def _open_pools(path: Path, digest: str) -> list[ImagePool]:
    return index_sources(open_image_table(path, digest))


def draw_shard(job: ShardJob, pools: list[ImagePool]) -> list[PlacedDraft]:
    """Return the drafts of one shard.

    Sources are drawn in proportion to their images times their ``weight``.
    """
    rng = random.Random(xxhash.xxh64_intdigest(f"{job.settings.seed}/{job.name}/{job.shard}".encode()))
    weights = {source.name: source.weight for source in job.settings.sources}
    sources = rng.choices(pools, [pool.size * weights[pool.name] for pool in pools], k=job.count)
    variants = list_variants(job.task, job.settings)
    placed: list[PlacedDraft] = []
    for record_id, pool in zip(list_ids(job), sources, strict=True):
        draft = build_draft(job.task, pool, rng, job.settings, record_id)
        placed.append(PlacedDraft(draft, pool.first, pick(rng, variants)))
    return placed


def list_variants(task: str, settings: BuildSettings) -> list[int]:
    """Return the numbers of a task's wordings: the first ``prompt_variants`` of the table and the user's own."""
    own = len(settings.prompts.get(task, ()))
    return [*range(min(settings.prompt_variants, len(TASKS[task].prompts))), *range(OWN_VARIANT, OWN_VARIANT + own)]


def list_ids(job: ShardJob) -> list[str]:
    """Return the ids of a shard's records: the data set's name and the record's number in it."""
    first = job.shard * job.settings.records_per_shard
    return [f"{job.name}-{number:010d}" for number in range(first, first + job.count)]


def write_shard_job(job: ShardJob) -> ShardJob:
    """Draw and write one shard and return its job.

    Raises:
        DataError: a record does not fit ``cutoff_len``, or the file cannot be written.
    """
    pools = select_pools(_open_pools(job.table, job.digest), job.settings, job.stage)
    placed = draw_shard(job, [pool for pool in pools if explain_missing(job.task, pool) is None])
    table = open_image_table(job.table, job.digest)
    # The temporary file lies beside the folder: LLaMA-Factory reads every file of a data set folder.
    write_table(job.path, assemble_records(table, placed, job.task, list_ids(job)), job.path.parent.parent)
    return job


def assemble_records(table: ImageTable, placed: Sequence[PlacedDraft], task: str, ids: Sequence[str]) -> pa.Table:
    """Return the rows of ``INSTRUCTION_SCHEMA`` for drafts of one task.

    Args:
        table: the images that the drafts' numbers mean.
        placed: the drafts.
        task: a name of ``tasks.TASKS``.
        ids: the records' ids.
    """
    drafts = [item.draft for item in placed]
    rows = np.array([item.first_row + image for item in placed for image in item.draft.images], dtype=np.int64)
    sizes = [len(draft.images) for draft in drafts]
    first_rows = rows[np.cumsum([0, *sizes[:-1]])]
    columns = {
        "id": pa.array(ids, pa.string()),
        "task": pa.DictionaryArray.from_arrays(np.zeros(len(ids), dtype=np.int8), [task]).cast(pa.string()),
        "images": _make_lists(sizes, _take_images(table, rows)),
        "query_images": pa.array([draft.query_images for draft in drafts], pa.int16()),
        "captions": _make_lists(
            [len(draft.captions) for draft in drafts],
            _take_text(table.captions, [number for draft in drafts for number in draft.captions]),
        ),
        "attributes": _make_lists([len(draft.attributes) for draft in drafts], _take_attributes(table, drafts)),
        "answer": _make_answers(table, drafts),
        "dataset": _take_text(table.get_column("dataset"), first_rows),
        "variant": pa.array([item.variant for item in placed], pa.int16()),
        "turns": _make_lists([len(draft.turns) for draft in drafts], _make_turns(table, drafts)),
    }
    return pa.Table.from_arrays([columns[name] for name in INSTRUCTION_SCHEMA.names], schema=INSTRUCTION_SCHEMA)


def _make_lists(sizes: Sequence[int], values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(np.cumsum([0, *sizes], dtype=np.int32), values)


def _take_text(texts: pa.Array, numbers: Sequence[int | None] | np.ndarray) -> pa.Array:
    return texts.take(pa.array(numbers, pa.int64())).cast(pa.string())


def _take_images(table: ImageTable, rows: np.ndarray) -> pa.Array:
    sizes = [table.get_column(name).take(pa.array(rows)) for name in ("width", "height")]
    return pa.StructArray.from_arrays(
        [_take_text(table.get_column("path"), rows), *sizes], names=["path", "width", "height"]
    )


def _take_attributes(table: ImageTable, drafts: Sequence[Draft]) -> pa.Array:
    pairs = [pair for draft in drafts for pair in draft.attributes]
    numbers = [number for _, number in pairs]
    texts = [_take_text(table.attributes.field(name), numbers) for name in ("name", "value")]
    return pa.StructArray.from_arrays(
        [pa.array([image for image, _ in pairs], pa.int16()), *texts], names=["image", "name", "value"]
    )


def _make_answers(table: ImageTable, drafts: Sequence[Draft]) -> pa.Array:
    indices = pa.array([index for draft in drafts for index in sorted(draft.matches)], pa.int16())
    fields = [
        _make_lists([len(draft.matches) for draft in drafts], indices),
        pa.array([draft.match for draft in drafts], pa.bool_()),
        _take_text(table.captions, [draft.text for draft in drafts]),
    ]
    return pa.StructArray.from_arrays(fields, names=["indices", "match", "text"])


def _make_turns(table: ImageTable, drafts: Sequence[Draft]) -> pa.Array:
    turns = [turn for draft in drafts for turn in draft.turns]
    indices = pa.array([index for turn in turns for index in sorted(turn.matches)], pa.int16())
    attributes = [turn.attribute for turn in turns]
    texts = [
        _take_text(table.captions, [turn.caption for turn in turns]),
        *(_take_text(table.attributes.field(name), attributes) for name in ("name", "value")),
    ]
    fields = [
        _make_lists([len(turn.matches) for turn in turns], indices),
        pa.array([turn.confirmed for turn in turns], pa.int16()),
        *(pc.fill_null(text, "") for text in texts),
    ]
    return pa.StructArray.from_arrays(fields, names=["indices", "confirmed", "caption", "name", "value"])


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

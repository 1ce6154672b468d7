"""One shard is one job: its bytes depend on the recipe, the images and its number alone, never on who writes it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import xxhash

from ..config import BuildSettings, Change, SourceSettings
from ..datasets.catalog import read_catalog
from ..images import ImagePolicy
from ..shards import write_table
from ..tasks import OWN_VARIANT, TASKS
from .builders import build_draft, explain_missing
from .drafts import PlacedDraft, assemble_records
from .draws import pick
from .image_table import ImageTable, open_image_table
from .sampler import ImagePool


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

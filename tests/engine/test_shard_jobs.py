"""Tests of chatreid_plugin.engine.shard_jobs: a shard's content depends on recipe, images and its number alone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chisquare

from chatreid_plugin.config import BuildSettings, SourceSettings
from chatreid_plugin.engine.drafts import PlacedDraft
from chatreid_plugin.engine.image_table import ImageTable, combine_images, digest_images, write_image_table
from chatreid_plugin.engine.shard_jobs import (
    ShardJob,
    choose_changes,
    draw_shard,
    index_sources,
    list_ids,
    list_variants,
    select_pools,
    write_shard_job,
)
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import INSTRUCTION_SCHEMA, ImageRecord, convert_row_to_instruction
from chatreid_plugin.shards import make_manifest_table, read_shard
from chatreid_plugin.tasks import TASKS


MakeJob = Callable[..., ShardJob]
PAIRS = "image_to_image_one_to_one"


@pytest.fixture
def table(make_images: Callable[..., list[ImageRecord]]) -> ImageTable:
    """Return two sources: 20 people with captions, and 10 without."""
    plain = [replace(record, dataset="plain") for record in make_images(people=10, captions=())]
    return ImageTable(combine_images([make_manifest_table(make_images()), make_manifest_table(plain)]))


@pytest.fixture
def make_job(table: ImageTable, tmp_path: Path) -> MakeJob:
    """Return a function that makes a job on the table's file."""
    file, digest = tmp_path / "images.arrow", digest_images(table.table)
    write_image_table(file, table.table)

    def make(
        task: str = PAIRS, shard: int = 0, count: int = 50, weights: tuple[float, float] = (1, 1), **changes: Any
    ) -> ShardJob:
        sources = [
            {"name": name, "root": "raw", "weight": weight}
            for name, weight in zip(("own", "plain"), weights, strict=True)
        ]
        recipe = BuildSettings.model_validate({"sources": sources, "records": {"stage2": 1}} | changes)
        path = tmp_path / "out" / "set" / f"{shard:05d}.parquet"
        return ShardJob(file, digest, recipe, task, TASKS[task].stages[0], "set", shard, count, path)

    return make


def draw(job: ShardJob, table: ImageTable) -> list[PlacedDraft]:
    return draw_shard(job, select_pools(index_sources(table), job.settings, job.stage))


def test_shard_holds_its_records(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(shard=3, count=7, records_per_shard=100)
    assert write_shard_job(job) == job
    records = [convert_row_to_instruction(row) for row in read_shard(job.path, INSTRUCTION_SCHEMA).to_pylist()]
    assert [record.id for record in records] == list_ids(job) == [f"set-{n:010d}" for n in range(300, 307)]
    assert {record.task for record in records} == {PAIRS}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set"]


def test_bytes_are_the_same_whatever_was_written_before(make_job: MakeJob) -> None:
    job = make_job(shard=1)
    write_shard_job(job)
    content = job.path.read_bytes()
    job.path.unlink()
    for other in (make_job(shard=0), make_job("standard_reid", shard=2), make_job(shard=4, count=3)):
        write_shard_job(other)
    write_shard_job(job)
    assert job.path.read_bytes() == content


def test_shards_tasks_and_seeds_draw_differently(make_job: MakeJob, table: ImageTable) -> None:
    first = draw(make_job(), table)
    assert draw(make_job(), table) == first
    assert draw(make_job(shard=1), table) != first
    assert draw(make_job(seed=1), table) != first
    assert draw(replace(make_job(), name="other"), table) != first


def test_sources_are_drawn_by_images_times_weight(make_job: MakeJob, table: ImageTable) -> None:
    for weights, expected in (((1, 1), [2000, 1000]), ((1, 4), [1000, 2000])):
        counts = Counter(placed.first_row for placed in draw(make_job(count=3000, weights=weights), table))
        assert chisquare([counts[0], counts[240]], expected).pvalue > 0.001


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"name": "market1501"}, {"camera": 1}),
        ({"name": "prcc"}, {"camera": 0.5, "clothes": 0.5}),
        ({"name": "mine", "parser": "sysumm01"}, {"camera": 0.3, "modality": 0.7}),
        ({"name": "mine", "parser": "pattern"}, {"camera": 1, "clothes": 1, "modality": 1}),
        ({"name": "prcc", "change": {"any": 1}}, {"any": 1}),
    ],
)
def test_matches_differ_in_what_the_data_sets_setting_is_about(source: Any, expected: dict[str, float]) -> None:
    assert choose_changes(SourceSettings.model_validate(source | {"root": "raw"})) == expected


def test_sources_that_cannot_give_a_task_are_left_out(make_job: MakeJob) -> None:
    job = make_job("image_captioning")
    write_shard_job(job)
    assert set(read_shard(job.path, INSTRUCTION_SCHEMA)["dataset"].to_pylist()) == {"own"}


def test_sources_of_other_stages_are_left_out(make_job: MakeJob, table: ImageTable) -> None:
    sources = [{"name": "own", "root": "raw", "stages": [1]}, {"name": "plain", "root": "raw", "stages": [2, 3]}]
    recipe = make_job(sources=sources).settings
    pools = index_sources(table)
    assert [[p.name for p in select_pools(pools, recipe, stage)] for stage in (1, 2, 3)] == [
        ["own"],
        ["plain"],
        ["plain"],
    ]


def test_tokens_are_counted_under_the_stages_policy(make_job: MakeJob, table: ImageTable) -> None:
    recipe = make_job().settings
    tokens = [select_pools(index_sources(table), recipe, stage)[0].tokens[0] for stage in (1, 2, 3)]
    assert tokens == [45, 10, 10]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("limit", [1, 2, 9])
def test_wordings_are_all_there_up_to_the_limit(task: str, limit: int, make_job: MakeJob) -> None:
    recipe = make_job(prompt_variants=limit).settings
    assert list_variants(task, recipe) == list(range(min(limit, len(TASKS[task].prompts))))


def test_wordings_are_used_alike(make_job: MakeJob, table: ImageTable) -> None:
    counts = Counter(placed.variant for placed in draw(make_job(count=3000), table))
    assert set(counts) == {0, 1, 2}
    assert chisquare(list(counts.values())).pvalue > 0.001


def test_record_that_does_not_fit_leaves_no_file(make_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Record set-0000000000: .* do not fit cutoff_len 64"):
        write_shard_job(make_job(cutoff_len=64))
    assert not (tmp_path / "out").exists()

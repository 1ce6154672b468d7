"""Tests of chatreid_plugin.engine.executors: a shard's content depends on recipe, images and its number alone."""

import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from scipy.stats import chisquare

from chatreid_plugin.config import BuildSettings, SourceSettings
from chatreid_plugin.engine import build, executors
from chatreid_plugin.engine.build import build_datasets
from chatreid_plugin.engine.executors import (
    SMALLEST_PARALLEL,
    PlacedDraft,
    ShardJob,
    assemble_records,
    choose_changes,
    draw_shard,
    index_sources,
    list_ids,
    list_variants,
    needs_processes,
    open_workers,
    select_pools,
    write_shard_job,
)
from chatreid_plugin.engine.pool import Draft, ImageTable, combine_images, digest_images, write_image_table
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.locks import LOCK_NAME
from chatreid_plugin.records import (
    INSTRUCTION_SCHEMA,
    Answer,
    Attribute,
    ImageRecord,
    ImageReference,
    Instruction,
    convert_instruction_to_row,
    convert_row_to_instruction,
)
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


def make_images(dataset: str, count: int, described: int) -> list[ImageRecord]:
    """Return images of which the first ``described`` have two captions and two attributes each."""
    records: list[ImageRecord] = []
    for number in range(count):
        path = f"{dataset}/{number}.jpg"
        record = ImageRecord(path, dataset, "train", path, f"{dataset}:{number}", "1", 10 + number, 20 + number)
        if number < described:
            looks = {"hat": f"{path} hat", "bag": f"{path} bag"}
            record = replace(record, captions=(f"{path} one", f"{path} two"), attributes=looks)
        records.append(record)
    return records


TABLE = ImageTable(
    combine_images([make_manifest_table(make_images("a", 3, 2)), make_manifest_table(make_images("b", 4, 4))])
)


def assemble(*placed: PlacedDraft, task: str = "standard_reid") -> list[Instruction]:
    table = assemble_records(TABLE, placed, task, [f"r-{number}" for number in range(len(placed))])
    assert table.schema.equals(INSTRUCTION_SCHEMA)
    table.validate(full=True)
    return [convert_row_to_instruction(row) for row in table.to_pylist()]


def refer(dataset: str, *numbers: int) -> tuple[ImageReference, ...]:
    return tuple(ImageReference(f"{dataset}/{number}.jpg", 10 + number, 20 + number) for number in numbers)


def test_images_are_those_of_the_drafts_source() -> None:
    # The second source begins with row 3.
    first, second = assemble(
        PlacedDraft(Draft([2, 0, 1], 1, [1]), 0, 0), PlacedDraft(Draft([3, 1, 0, 2], 1, [2, 0]), 3, 1)
    )
    assert first == Instruction("r-0", "standard_reid", refer("a", 2, 0, 1), 1, Answer((1,)), dataset="a")
    assert second == Instruction(
        "r-1", "standard_reid", refer("b", 3, 1, 0, 2), 1, Answer((0, 2)), dataset="b", variant=1
    )


def test_captions_and_attributes_are_numbers_of_the_whole_table() -> None:
    # Images of the first source have captions 0 to 3; those of the second begin with 4.
    placed = [
        PlacedDraft(Draft([1], 1, captions=[2, 3]), 0, 0),
        PlacedDraft(Draft([0, 2], 2, captions=[4], attributes=[(0, 5), (1, 8), (-1, 9)]), 3, 0),
    ]
    first, second = assemble(*placed, task="attribute_comparison")
    assert first.captions == ("a/1.jpg one", "a/1.jpg two")
    assert first.attributes == ()
    assert second.captions == ("b/0.jpg one",)
    assert second.attributes == (
        Attribute(0, "bag", "b/0.jpg bag"),
        Attribute(1, "hat", "b/2.jpg hat"),
        Attribute(-1, "bag", "b/2.jpg bag"),
    )


def test_answers_are_indices_a_match_or_a_text() -> None:
    drafts = [
        Draft([0, 1], 2, match=True),
        Draft([0, 1], 2, match=False),
        Draft([1], 1, text=11),
        Draft([1, 0], 1, [0]),
    ]
    records = assemble(*(PlacedDraft(draft, 3, 0) for draft in drafts))
    assert [record.answer for record in records] == [
        Answer(match=True),
        Answer(match=False),
        Answer(text="b/3.jpg two"),
        Answer((0,)),
    ]


def test_rows_are_those_of_the_instructions() -> None:
    placed = [
        PlacedDraft(Draft([0, 2, 1], 1, [1], captions=[0], attributes=[(0, 1)]), 0, 2),
        PlacedDraft(Draft([3], 1, text=4), 3, 0),
    ]
    table = assemble_records(TABLE, placed, "multimodal_retrieval", ["x-0", "x-1"])
    rows = [convert_instruction_to_row(convert_row_to_instruction(row)) for row in table.to_pylist()]
    assert table.equals(pa.Table.from_pylist(rows, INSTRUCTION_SCHEMA))


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
    monkeypatch.setattr(build, "open_workers", lambda *rest: pytest.fail("processes were started"))
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

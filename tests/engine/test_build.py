"""Tests of chatreid_plugin.engine.build: shares, the same bytes again, dry runs, and what is entered."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from chatreid_plugin.answers import render_answer
from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.build import (
    BuildReport,
    PlannedDataset,
    build_datasets,
    enter_dataset,
    name_dataset,
    plan_datasets,
    share_out,
)
from chatreid_plugin.engine.sampler import ImagePool
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.records import INSTRUCTION_SCHEMA, Instruction, convert_row_to_instruction
from chatreid_plugin.shards import LEFT_OUT, read_shard
from chatreid_plugin.tasks import TASKS, list_stage_tasks, render_prompt


MakeRecipe = Callable[..., BuildSettings]
PAIRS = "chatreid_stage2_image_to_image_one_to_one"


def list_files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob(pattern) if path.is_file()}


def read_records(output: Path, name: str) -> list[Instruction]:
    tables = [read_shard(path, INSTRUCTION_SCHEMA) for path in sorted((output / name).iterdir())]
    return [convert_row_to_instruction(row) for table in tables for row in table.to_pylist()]


def read_entries(output: Path) -> dict[str, Any]:
    return json.loads((output / "dataset_info.json").read_text())


def test_stage_2_is_shared_out_as_in_the_paper(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    report = build_datasets(recipe)
    assert report.datasets == {
        "chatreid_stage1_image_captioning": 20,
        "chatreid_stage2_image_to_image_one_to_one": 25,
        "chatreid_stage2_image_to_image_many_to_many": 25,
        "chatreid_stage2_text_to_image_one_to_one": 10,
        "chatreid_stage2_text_to_image_many_to_one": 10,
        "chatreid_stage2_text_to_image_one_to_many": 10,
        "chatreid_stage2_attribute_comparison": 10,
        "chatreid_stage2_attribute_prediction": 10,
        "chatreid_stage3_image_to_image_one_to_one": 3,
        "chatreid_stage3_text_to_image_one_to_one": 1,
        "chatreid_stage3_standard_reid": 5,
        "chatreid_stage3_text_to_image_reid": 4,
        "chatreid_stage3_attribute_retrieval": 2,
        "chatreid_stage3_multimodal_retrieval": 2,
        "chatreid_stage3_dialogue_retrieval": 1,
        "chatreid_stage3_attribute_one_to_one": 1,
        "chatreid_stage3_multimodal_one_to_one": 1,
    }
    assert report.skipped == {
        "chatreid_stage3_cloth_changing_reid": "no identity in two outfits and two cameras",
        "chatreid_stage3_visible_infrared_reid": "no identity both visible and infrared",
    }
    assert report.reused == []
    for name, count in report.datasets.items():
        records = read_records(recipe.output_dir, name)
        assert [record.id for record in records] == [f"{name}-{number:010d}" for number in range(count)]
        assert {record.task for record in records} == {name.split("_", 2)[2]}
        assert {record.id.rpartition("-")[0] for record in records} == {name}
        shards = sorted(path.name for path in (recipe.output_dir / name).iterdir())
        assert shards == [f"{number:05d}.parquet" for number in range(-(-count // 8))]


def test_every_record_renders_and_its_images_exist(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    for name in build_datasets(recipe).datasets:
        entry = read_entries(recipe.output_dir)[name]
        root = recipe.output_dir / entry["chatreid"]["image_root"]
        for record in read_records(recipe.output_dir, name):
            assert render_prompt(record).count("<image>") == len(record.images)
            assert render_answer(record)
            assert all((root / image.path).is_file() for image in record.images)
            assert all("bounding_box_train" in image.path for image in record.images)


def test_same_recipe_gives_the_same_bytes_and_another_seed_others(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    contents = [
        list_files(build_datasets(make_recipe(output_dir=tmp_path / name, seed=seed)).output_dir, "*.parquet")
        for name, seed in (("one", 0), ("two", 0), ("three", 1))
    ]
    assert contents[0] == contents[1]
    assert contents[0].keys() == contents[2].keys()
    assert all(contents[0][name] != contents[2][name] for name in contents[0])


def test_dry_run_writes_nothing_and_says_the_same(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    planned = build_datasets(recipe, dry_run=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert planned.datasets == build_datasets(recipe).datasets


def test_tasks_without_captions_and_attributes_are_reported_and_their_share_goes_to_the_others(
    make_recipe: MakeRecipe, world: Path
) -> None:
    source = make_recipe().sources[0].model_dump() | {"captions": None}
    report = build_datasets(make_recipe(sources=[source]))
    assert report.datasets == {
        "chatreid_stage2_image_to_image_one_to_one": 50,
        "chatreid_stage2_image_to_image_many_to_many": 50,
        "chatreid_stage3_image_to_image_one_to_one": 7,
        "chatreid_stage3_standard_reid": 13,
    }
    assert report.skipped == {
        "chatreid_stage1_image_captioning": "no captions",
        "chatreid_stage2_text_to_image_one_to_one": "no captions",
        "chatreid_stage2_text_to_image_many_to_one": "no captions",
        "chatreid_stage2_text_to_image_one_to_many": "no captions",
        "chatreid_stage2_attribute_comparison": "no attributes",
        "chatreid_stage2_attribute_prediction": "no attributes",
        "chatreid_stage3_cloth_changing_reid": "no identity in two outfits and two cameras",
        "chatreid_stage3_visible_infrared_reid": "no identity both visible and infrared",
        "chatreid_stage3_text_to_image_reid": "no captions",
        "chatreid_stage3_attribute_retrieval": "no attributes",
        "chatreid_stage3_dialogue_retrieval": "neither captions nor attributes",
        "chatreid_stage3_text_to_image_one_to_one": "no captions",
        "chatreid_stage3_multimodal_retrieval": "no identity seen by two cameras and described in two ways",
        "chatreid_stage3_attribute_one_to_one": "no attributes",
        "chatreid_stage3_multimodal_one_to_one": "no identity seen by two cameras and described in two ways",
    }
    text = report.render()
    assert "chatreid_stage2_attribute_prediction" in text and "left out: no attributes" in text
    assert json.loads(report.to_json())["skipped"] == report.skipped
    # For the training run that asks for them; until they are built.
    noted = make_recipe().output_dir / LEFT_OUT
    assert json.loads(noted.read_text()) == report.skipped
    again = build_datasets(make_recipe(), overwrite=True)
    assert json.loads(noted.read_text()) == again.skipped
    assert "chatreid_stage1_image_captioning" not in again.skipped


def test_nothing_to_build_is_an_error_with_the_reasons(make_recipe: MakeRecipe) -> None:
    source = make_recipe().sources[0].model_dump() | {"captions": None}
    with pytest.raises(DataError, match="Nothing can be built. chatreid_stage1_image_captioning: no captions"):
        build_datasets(make_recipe(sources=[source], records={"stage1": 5}))


def test_tasks_without_a_share_are_reported(make_recipe: MakeRecipe) -> None:
    ratios = {"attribute_prediction": 1.0, "attribute_comparison": 0.0, "image_to_image_one_to_one": 0.001}
    report = build_datasets(make_recipe(records={"stage2": 10}, stage2_ratios=ratios), dry_run=True)
    assert report.datasets == {"chatreid_stage2_attribute_prediction": 10}
    assert report.skipped["chatreid_stage2_attribute_comparison"] == "no share in stage2_ratios"
    assert report.skipped["chatreid_stage2_text_to_image_one_to_one"] == "no share in stage2_ratios"
    assert report.skipped[PAIRS] == "its share of 10 records is less than one"


def test_a_source_that_cannot_give_a_task_leaves_it_to_the_other(make_recipe: MakeRecipe, world: Path) -> None:
    described = make_recipe().sources[0].model_dump()
    plain = described | {"name": "plain", "captions": None}
    recipe = make_recipe(sources=[described, plain])
    report = build_datasets(recipe)
    assert set(report.skipped) == {"chatreid_stage3_cloth_changing_reid", "chatreid_stage3_visible_infrared_reid"}
    captioned = read_records(recipe.output_dir, "chatreid_stage1_image_captioning")
    assert {record.dataset for record in captioned} == {"world"}
    assert {record.dataset for record in read_records(recipe.output_dir, PAIRS)} == {"world", "plain"}


def test_sources_train_the_stages_they_are_meant_for(make_recipe: MakeRecipe) -> None:
    first = make_recipe().sources[0].model_dump() | {"stages": [1, 2]}
    sources = [first, first | {"name": "other", "stages": [2, 3]}, first | {"name": "tested", "stages": []}]
    recipe = make_recipe(sources=sources, records={"stage1": 50, "stage2": 200, "stage3": 50})
    report = build_datasets(recipe)
    trained = {1: {"world"}, 2: {"world", "other"}, 3: {"other"}}
    for stage, names in trained.items():
        datasets = [name for name in report.datasets if f"stage{stage}" in name]
        assert {r.dataset for name in datasets for r in read_records(recipe.output_dir, name)} == names


def test_stage_without_a_source_is_left_out_with_the_reason(make_recipe: MakeRecipe) -> None:
    source = make_recipe().sources[0].model_dump() | {"stages": [2]}
    report = build_datasets(make_recipe(sources=[source]), dry_run=True)
    assert report.skipped["chatreid_stage1_image_captioning"] == "no source trains this stage"
    assert not any("stage3" in name or "stage1" in name for name in report.datasets)


def test_records_come_from_sources_by_their_images_and_weights(make_recipe: MakeRecipe) -> None:
    source = make_recipe().sources[0].model_dump()
    recipe = make_recipe(
        sources=[source, source | {"name": "other", "weight": 3.0}],
        records={"stage2": 2000},
        stage2_ratios={"image_to_image_one_to_one": 1},
        records_per_shard=1000,
    )
    build_datasets(recipe)
    counts = Counter(record.dataset for record in read_records(recipe.output_dir, PAIRS))
    assert chisquare([counts["world"], counts["other"]], [500, 1500]).pvalue > 0.001


def test_images_of_all_sources_exist_under_the_common_root(
    make_recipe: MakeRecipe, tmp_path: Path, world: Path
) -> None:
    shutil.copytree(world, tmp_path / "second" / "copy")
    source = make_recipe().sources[0].model_dump()
    recipe = make_recipe(sources=[source, source | {"name": "copy", "root": tmp_path / "second" / "copy"}])
    for name in build_datasets(recipe).datasets:
        root = recipe.output_dir / read_entries(recipe.output_dir)[name]["chatreid"]["image_root"]
        for record in read_records(recipe.output_dir, name):
            folder = {"world": "world", "copy": "second/copy"}[record.dataset]
            assert all(image.path.startswith(f"{folder}/bounding_box_train/") for image in record.images)
            assert all((root / image.path).is_file() for image in record.images)


def test_image_root_is_relative_and_that_of_all_sources(
    make_recipe: MakeRecipe, tmp_path: Path, make_image: Callable[..., Path]
) -> None:
    recipe = make_recipe(records={"stage3": 8}, stage3_ratios={"standard_reid": 1})
    build_datasets(recipe)
    entry = {"file_name": "chatreid_stage3_standard_reid", "formatting": "chatreid"}
    assert read_entries(recipe.output_dir) == {
        "chatreid_stage3_standard_reid": entry | {"chatreid": {"image_root": "../world", "stage": 3}}
    }
    for person in range(4):
        for camera in range(2):
            make_image(tmp_path / "more" / "crops" / f"{person}_{camera}.jpg")
    own = {
        "name": "own",
        "parser": "pattern",
        "root": tmp_path / "more" / "crops",
        "pattern": "{person}_{camera}.jpg",
        "train_share": 1,
    }
    both = make_recipe(
        sources=[recipe.sources[0].model_dump(), own],
        records={"stage3": 60},
        stage3_ratios={"standard_reid": 1},
        output_dir=tmp_path / "a" / "b",
    )
    build_datasets(both)
    assert read_entries(both.output_dir)["chatreid_stage3_standard_reid"]["chatreid"]["image_root"] == "../.."
    records = read_records(both.output_dir, "chatreid_stage3_standard_reid")
    assert {record.dataset for record in records} == {"world", "own"}
    assert {record.images[0].path.split("/")[0] for record in records} == {"world", "more"}
    # No record mixes two data sets: their cameras and identities have nothing in common.
    assert all(len({image.path.split("/")[0] for image in record.images}) == 1 for record in records)


def test_entries_of_others_stay(tmp_path: Path) -> None:
    mine = {"alpaca": {"file_name": "alpaca.json", "formatting": "alpaca"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(mine))
    plan = PlannedDataset("standard_reid", 3, 1)
    name = "chatreid_stage3_standard_reid"
    enter_dataset(tmp_path, plan, tmp_path / "images")
    enter_dataset(tmp_path, plan, tmp_path / "moved")
    assert read_entries(tmp_path) == mine | {
        name: {"file_name": name, "formatting": "chatreid", "chatreid": {"image_root": "moved", "stage": 3}}
    }


def test_strange_dataset_info_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("[]")
    with pytest.raises(DataError, match=r"dataset_info\.json is not a JSON object"):
        enter_dataset(tmp_path, PlannedDataset("standard_reid", 3, 1), tmp_path)


def test_provenance_stands_beside_the_data_set(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    build_datasets(recipe)
    provenance = json.loads((recipe.output_dir / f"{PAIRS}.json").read_text())
    assert provenance["records"] == sum(
        pq.read_metadata(path).num_rows for path in (recipe.output_dir / PAIRS).iterdir()
    )
    assert provenance["settings"] == recipe.model_dump(mode="json", by_alias=True)
    assert provenance["versions"]["pyarrow"] == pa.__version__
    assert len(provenance["fingerprint"]) == len(provenance["images_digest"]) == 32


MakePool = Callable[..., ImagePool]


def make_settings(**changes: Any) -> BuildSettings:
    return BuildSettings.model_validate(
        {"sources": [{"name": "own", "root": "raw"}], "records": {"stage1": 1}} | changes
    )


def plan(recipe: BuildSettings, *pools: ImagePool) -> tuple[dict[str, int], dict[str, str]]:
    """Return the plan and what is left out."""
    report = BuildReport(Path("out"))
    planned = plan_datasets(recipe, pools, report)
    assert all(dataset.name == name_dataset(dataset.task, dataset.stage) for dataset in planned)
    return {dataset.task: dataset.records for dataset in planned}, report.skipped


@settings(deadline=None)
@given(st.integers(0, 10**7), st.dictionaries(st.text(max_size=3), st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_shares_add_up_and_are_less_than_one_away(total: int, weights: dict[str, float]) -> None:
    shares = share_out(total, weights)
    assert list(shares) == list(weights)
    assert sum(shares.values()) == total
    for name, count in shares.items():
        assert abs(count - total * weights[name] / sum(weights.values())) < 1 + 1e-6


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        # 3.5, 3.0, 0.5: the first of the equal remainders gets the record that is left.
        (7, {"a": 7, "b": 6, "c": 1}, {"a": 4, "b": 3, "c": 0}),
        (5, {"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 1}),
        # 1.4, 6.2, 2.4: one record left for 0.4, the first of two.
        (10, {"a": 0.14, "b": 0.62, "c": 0.24}, {"a": 2, "b": 6, "c": 2}),
        (10, {"a": 0.13, "b": 0.62, "c": 0.25}, {"a": 1, "b": 6, "c": 3}),
        (3, {"a": 1, "b": 0}, {"a": 3, "b": 0}),
        (5, {}, {}),
    ],
)
def test_largest_remainders_round_up(total: int, weights: dict[str, float], expected: dict[str, int]) -> None:
    assert share_out(total, weights) == expected


@pytest.mark.parametrize("total", [1, 99, 1000, 3_000_000])
def test_stage_2_follows_the_papers_ratios_exactly(make_pool: MakePool, total: int) -> None:
    counts, skipped = plan(make_settings(records={"stage2": total}), make_pool())
    assert sum(counts.values()) == total
    for task in list_stage_tasks(2):
        share = 0.25 if task.name.startswith("image_to_image") else 0.1
        assert abs(counts.get(task.name, 0) - total * share) < 1
    # Only what rounds to nothing is left out.
    assert all("less than one" in reason for reason in skipped.values())


def test_stage_3_is_shared_out_among_what_can_be_built(make_pool: MakePool) -> None:
    recipe = make_settings(records={"stage3": 1000})
    counts, skipped = plan(recipe, make_pool(cameras=6, outfits=3, infrared=2, views=True))
    assert (counts, skipped) == ({name: round(1000 * share) for name, share in recipe.stage3_ratios.items()}, {})
    counts, skipped = plan(recipe, make_pool(views=True))
    # 28 % of the mix has no labels here.
    assert counts == {name: round(1000 * recipe.stage3_ratios[name] / 0.72) for name in counts}
    assert sum(counts.values()) == 1000
    assert skipped == {
        "chatreid_stage3_cloth_changing_reid": "no identity in two outfits and two cameras",
        "chatreid_stage3_visible_infrared_reid": "no identity both visible and infrared",
    }


def test_stage_3_ratios_are_the_ones_asked_for(make_pool: MakePool) -> None:
    ratios = {"standard_reid": 3.0, "attribute_retrieval": 1.0, "multimodal_retrieval": 0.0}
    counts, skipped = plan(make_settings(records={"stage3": 40}, stage3_ratios=ratios), make_pool())
    assert counts == {"standard_reid": 30, "attribute_retrieval": 10}
    assert skipped["chatreid_stage3_multimodal_retrieval"] == "no share in stage3_ratios"
    assert skipped["chatreid_stage3_text_to_image_reid"] == "no share in stage3_ratios"


def test_a_task_is_built_if_one_source_can(make_pool: MakePool) -> None:
    counts, skipped = plan(make_settings(records={"stage1": 5}), make_pool(captions=()), make_pool())
    assert (counts, skipped) == ({"image_captioning": 5}, {})


def test_reasons_of_all_sources_are_named(make_pool: MakePool) -> None:
    pools = make_pool(people=1), make_pool(cameras=1)
    _, skipped = plan(make_settings(records={"stage3": 5}), *pools)
    assert skipped["chatreid_stage3_standard_reid"] == "no identity seen by two cameras, only one identity"


def test_source_counts_only_for_the_stages_it_trains(make_pool: MakePool) -> None:
    source = {"name": "own", "root": "raw", "stages": [3]}
    records = {"stage1": 5, "stage3": 5}
    recipe = make_settings(sources=[source], records=records, stage3_ratios={"standard_reid": 1})
    counts, skipped = plan(recipe, make_pool())
    assert counts == {"standard_reid": 5}
    assert skipped["chatreid_stage1_image_captioning"] == "no source trains this stage"


def test_pairs_across_modalities_need_no_second_camera_of_one(make_pool: MakePool) -> None:
    # As in RegDB: one visible and one infrared camera.
    pool = make_pool(cameras=2, infrared=1)
    recipe = {"records": {"stage2": 10}, "stage2_ratios": {"image_to_image_one_to_one": 1}}
    assert plan(make_settings(**recipe), pool)[0] == {"image_to_image_one_to_one": 10}
    same_modality = make_settings(sources=[{"name": "own", "root": "raw", "change": {"camera": 1}}], **recipe)
    counts, skipped = plan(same_modality, pool)
    assert counts == {}
    assert skipped["chatreid_stage2_image_to_image_one_to_one"] == "no identity seen by two cameras"


def test_share_of_less_than_one_record_is_said(make_pool: MakePool) -> None:
    ratios = {"attribute_prediction": 1.0, "image_to_image_one_to_one": 0.001}
    counts, skipped = plan(make_settings(records={"stage2": 10}, stage2_ratios=ratios), make_pool())
    assert counts == {"attribute_prediction": 10}
    name = name_dataset("image_to_image_one_to_one", 2)
    assert skipped[name] == "its share of 10 records is less than one"


def test_data_sets_are_named_after_stage_and_task() -> None:
    assert name_dataset("image_captioning", 1) == "chatreid_stage1_image_captioning"
    names = [name_dataset(task.name, stage) for task in TASKS.values() for stage in task.stages]
    assert len(set(names)) == len(names) == 19


def test_report_lists_everything() -> None:
    report = BuildReport(Path("out"), {"a": 12345}, {"b": "no captions"}, ["a"], 3000, 1.5)
    assert [line.split() for line in report.render().splitlines()] == [
        ["a", "12,345", "records"],
        ["b", "left", "out:", "no", "captions"],
        ["3,000", "records", "written", "in", "1.5", "s", "(2,000", "records/s)"],
        ["dataset_dir:", "out"],
    ]
    assert json.loads(report.to_json()) == {
        "output_dir": "out",
        "datasets": {"a": 12345},
        "skipped": {"b": "no captions"},
        "reused": ["a"],
        "written": 3000,
        "seconds": 1.5,
    }


def test_report_ends_with_the_commands_that_train_what_was_built() -> None:
    names = ["chatreid_stage1_image_captioning", *(name_dataset(task.name, 2) for task in list_stage_tasks(2))]
    names += ["chatreid_stage3_standard_reid", "chatreid_stage3_attribute_retrieval"]
    report = BuildReport(Path("dataset_info"), dict.fromkeys(names, 1), written=1)
    train = "  FORCE_TORCHRUN=1 llamafactory-cli train examples"
    lines = report.render().splitlines()
    assert lines[-3:] == [f"{train}/stage1.yaml", f"{train}/stage2.yaml", f"{train}/stage3.yaml"]
    assert lines[-4].startswith("Next (on one GPU without FORCE_TORCHRUN=1 and with deepspeed=null)")
    assert not any(line.startswith("Tasks without") for line in lines)
    report = BuildReport(Path("dataset_info"), dict.fromkeys(names, 1))
    assert "Next" not in report.render()  # a plan: nothing was built


def test_report_says_how_stage_2_trains_without_stage_1() -> None:
    built = name_dataset("image_to_image_one_to_one", 2)
    names = name_dataset("image_captioning", 1), name_dataset("attribute_comparison", 2)
    skipped = dict(zip(names, ("no captions", "no attributes"), strict=True))
    lines = BuildReport(Path("my data"), {built: 5}, skipped, reused=[built]).render().splitlines()
    command = "FORCE_TORCHRUN=1 llamafactory-cli train examples/stage2.yaml"
    assert lines[-1] == f"  {command} chatreid_encoder=null dataset_dir='my data'"
    assert lines[-3].startswith("Tasks without captions or attributes are left out. To train them, write a `captions`")
    # Another recipe's Stage 1 may be there.
    lines = BuildReport(Path("dataset_info"), {built: 5}, {}, reused=[built]).render().splitlines()
    assert lines[-1] == f"  {command}"


def test_recipe_without_records_is_refused() -> None:
    with pytest.raises(ConfigError, match="`records` names no stage"):
        plan(make_settings(records={}))

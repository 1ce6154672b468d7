"""Tests of chatreid_plugin.engine.runner: shares, the same bytes again, dry runs, and what is entered."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import chisquare

from chatreid_plugin.answers import render_answer
from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.plan import PlannedDataset
from chatreid_plugin.engine.runner import build_datasets, enter_dataset
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import INSTRUCTION_SCHEMA, Instruction, convert_row_to_instruction
from chatreid_plugin.shards import LEFT_OUT, read_shard
from chatreid_plugin.tasks import render_prompt


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

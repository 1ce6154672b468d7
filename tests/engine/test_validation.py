"""Tests of chatreid_plugin.engine.validation: people who are held out train no record, and are drawn from the seed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.runner import build_datasets
from chatreid_plugin.engine.stats import compute_statistics
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import INSTRUCTION_SCHEMA
from chatreid_plugin.shards import read_shard


MakeRecipe = Callable[..., BuildSettings]
SHARE = {"validation_share": 0.25, "records": {"stage1": 40, "stage2": 100, "stage3": 40}}


def list_people(output: Path, names: list[str]) -> set[str]:
    """Return who is on the images of some data sets: Market-1501's file names begin with the person."""
    paths = {
        image["path"]
        for name in names
        for shard in (output / name).glob("*.parquet")
        for row in read_shard(shard, INSTRUCTION_SCHEMA).to_pylist()
        for image in row["images"]
    }
    return {Path(path).name.partition("_")[0] for path in paths}


def build(recipe: BuildSettings) -> tuple[set[str], set[str]]:
    names = list(build_datasets(recipe).datasets)
    held_out = [name for name in names if name.endswith("_val")]
    return list_people(recipe.output_dir, [name for name in names if name not in held_out]), list_people(
        recipe.output_dir, held_out
    )


def test_people_held_out_train_no_record(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**SHARE)
    report = build_datasets(recipe)
    trained = {name: count for name, count in report.datasets.items() if not name.endswith("_val")}
    assert trained == build_datasets(make_recipe(records=SHARE["records"]), dry_run=True).datasets
    assert report.datasets["chatreid_stage1_image_captioning_val"] == 10
    assert sum(count for name, count in report.datasets.items() if "stage2" in name and name not in trained) == 25
    training, held_out = build(recipe)
    assert (len(training), len(held_out)) == (6, 2) and not training & held_out
    assert build_datasets(recipe).written == 0
    entries = json.loads((recipe.output_dir / "dataset_info.json").read_text())
    assert entries.keys() == report.datasets.keys()
    text = report.render()
    assert "examples/stage1.yaml eval_dataset=chatreid_stage1 dataset_dir=" in text
    statistics = compute_statistics(recipe.output_dir).datasets
    shares = [statistics[f"chatreid_stage2_image_to_image_one_to_one{end}"].share for end in ("", "_val")]
    assert shares == pytest.approx([0.25, 0.25], abs=0.05)


def test_people_are_drawn_from_the_seed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def draw(seed: int, folder: str) -> set[str]:
        return build(make_recipe(**SHARE, seed=seed, output_dir=tmp_path / folder))[1]

    first = draw(0, "a")
    assert first == draw(0, "b")
    assert any(draw(seed, f"c{seed}") != first for seed in (1, 2))


def test_too_few_people_are_refused_by_name(make_recipe: MakeRecipe) -> None:
    with pytest.raises(DataError, match="validation_share: 0.9 would hold out 7 of the 8 identities of world"):
        build_datasets(make_recipe(validation_share=0.9), dry_run=True)


def test_dry_run_says_what_would_be_held_out(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**SHARE)
    planned = build_datasets(recipe, dry_run=True)
    assert not recipe.output_dir.exists()
    assert planned.datasets == build_datasets(recipe).datasets

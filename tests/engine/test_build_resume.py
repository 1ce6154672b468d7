"""Tests of chatreid_plugin.engine.build: killed builds go on, and what other settings left is never mixed in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin import tasks
from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine import executors
from chatreid_plugin.engine.build import build_datasets
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.locks import hold_folder, share_folder
from chatreid_plugin.tasks import TASKS


MakeRecipe = Callable[..., BuildSettings]
PAIRS = "chatreid_stage2_image_to_image_one_to_one"


def list_files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob(pattern) if path.is_file()}


def read_entries(output: Path) -> dict[str, Any]:
    return json.loads((output / "dataset_info.json").read_text())


def test_killed_build_goes_on_to_the_same_bytes(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list_files(build_datasets(make_recipe(output_dir=tmp_path / "whole")).output_dir, "*.parquet")
    recipe = make_recipe(output_dir=tmp_path / "killed")
    written: list[str] = []
    write_table = executors.write_table

    def write_and_die(path: Path, *rest: Any) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path.relative_to(recipe.output_dir).as_posix())
        write_table(path, *rest)

    monkeypatch.setattr(executors, "write_table", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        build_datasets(recipe)
    # Three shards of the first data set, and the second one dies in its second shard.
    assert written == [f"chatreid_stage1_image_captioning/0000{n}.parquet" for n in range(3)] + [
        f"{PAIRS}/00000.parquet"
    ]
    assert sorted(list_files(recipe.output_dir, "*.parquet")) == written
    assert json.loads((recipe.output_dir / f"{PAIRS}.json").read_text())["complete"] is False
    assert list(read_entries(recipe.output_dir)) == ["chatreid_stage1_image_captioning"]

    kept = {name: (recipe.output_dir / name).stat().st_mtime_ns for name in written}
    monkeypatch.setattr(executors, "write_table", write_table)
    report = build_datasets(recipe)
    assert report.reused == ["chatreid_stage1_image_captioning"]
    assert list_files(recipe.output_dir, "*.parquet") == whole
    assert {name: (recipe.output_dir / name).stat().st_mtime_ns for name in written} == kept
    assert json.loads((recipe.output_dir / f"{PAIRS}.json").read_text())["complete"] is True


def test_finished_build_is_used_again(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe()
    first = build_datasets(recipe)
    before = list_files(recipe.output_dir)
    monkeypatch.setattr(executors, "write_table", lambda *rest: pytest.fail("a shard was written again"))
    second = build_datasets(recipe)
    assert second.datasets == first.datasets
    assert second.reused == list(first.datasets)
    assert list_files(recipe.output_dir) == before


@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_shard_that_is_missing_or_cut_short_is_built_again(make_recipe: MakeRecipe, damage: str) -> None:
    recipe = make_recipe()
    build_datasets(recipe)
    before = list_files(recipe.output_dir)
    path = recipe.output_dir / PAIRS / "00001.parquet"
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    report = build_datasets(recipe)
    assert PAIRS not in report.reused
    assert len(report.reused) == len(report.datasets) - 1
    assert list_files(recipe.output_dir) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 5},
        {"records": {"stage1": 20, "stage2": 120, "stage3": 20}},
        {"gallery": {"max_size": 4}},
        {"cutoff_len": 1024},
        {"records_per_shard": 9},
        {"prompt_variants": 1},
        {"records": {"stage1": 20, "stage2": 100, "stage3": 24}},
    ],
)
def test_other_settings_are_refused_and_overwritten_when_asked(
    make_recipe: MakeRecipe, tmp_path: Path, changes: dict[str, Any]
) -> None:
    build_datasets(make_recipe())
    before = list_files(make_recipe().output_dir)
    with pytest.raises(DataError, match=r"was built from other settings .*--overwrite"):
        build_datasets(make_recipe(**changes))
    assert list_files(make_recipe().output_dir) == before
    report = build_datasets(make_recipe(**changes), overwrite=True)
    clean = build_datasets(make_recipe(**changes, output_dir=tmp_path / "clean"))
    assert list_files(report.output_dir, "*.parquet") == list_files(clean.output_dir, "*.parquet")


@pytest.mark.parametrize("changes", [{"weight": 2.0}, {"stages": [1, 2, 3], "name": "other"}, {"stages": [1, 2]}])
def test_other_weights_names_and_stages_of_the_sources_are_refused(
    make_recipe: MakeRecipe, changes: dict[str, Any]
) -> None:
    build_datasets(make_recipe())
    source = make_recipe().sources[0].model_dump() | changes
    with pytest.raises(DataError, match=r"was built from other settings .*--overwrite"):
        build_datasets(make_recipe(sources=[source]))


@pytest.mark.parametrize("changes", [{"workers": 2}, {"executor": "ray"}, {"manifest_dir": "elsewhere"}])
def test_who_does_the_work_is_no_other_setting(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    report = build_datasets(make_recipe())
    assert build_datasets(make_recipe(**changes)).reused == list(report.datasets)


def test_other_images_are_refused(make_recipe: MakeRecipe, world: Path) -> None:
    recipe = make_recipe()
    build_datasets(recipe)
    text = (world / "captions.jsonl").read_text()
    (world / "captions.jsonl").write_text(text.replace("wears", "has on"))
    with pytest.raises(DataError, match="was built from other settings or images"):
        build_datasets(recipe)


def test_prompts_may_be_edited_without_building_again(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    build_datasets(recipe)
    task = TASKS["standard_reid"]
    edited = tasks.Task(task.name, task.stages, task.answer_kind, ("New words {image} {gallery}", *task.prompts[1:]))
    monkeypatch.setitem(TASKS, "standard_reid", edited)
    assert "chatreid_stage3_standard_reid" in build_datasets(recipe).reused


def test_shards_of_a_killed_overwriting_never_pass_for_the_old_recipes(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, other = make_recipe(), make_recipe(seed=1)
    build_datasets(recipe)
    before = list_files(recipe.output_dir, "*.parquet")

    write_table = executors.write_table

    def write_one_and_die(path: Path, *rest: Any) -> None:
        if path.name != "00000.parquet":
            raise KeyboardInterrupt
        write_table(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(executors, "write_table", write_one_and_die)
        with pytest.raises(KeyboardInterrupt):
            build_datasets(other, overwrite=True)
    build_datasets(recipe, overwrite=True)
    assert list_files(recipe.output_dir, "*.parquet") == before


@pytest.mark.parametrize("finished", [True, False])
def test_leftovers_of_a_killed_build_are_removed_and_files_of_others_stay(
    make_recipe: MakeRecipe, finished: bool
) -> None:
    recipe = make_recipe()
    build_datasets(recipe)
    if not finished:
        (recipe.output_dir / PAIRS / "00001.parquet").unlink()
    before = list_files(recipe.output_dir) | list_files(recipe.manifest_dir)
    others = [
        recipe.output_dir / ".notes.tmp",
        recipe.output_dir / "alpaca.json",
        recipe.manifest_dir / ".own.parquet.1.tmp",
    ]
    leftovers = [
        recipe.output_dir / ".00001.parquet.12345.tmp",
        recipe.output_dir / f".{PAIRS}.json.12345.tmp",
        recipe.output_dir / ".dataset_info.json.12345.tmp",
        recipe.output_dir / ".training_images.0123abcd.arrow",
        recipe.output_dir / "..training_images.0123abcd.arrow.12345.tmp",
        recipe.manifest_dir / ".world.parquet.12345.tmp",
        recipe.manifest_dir / ".world.parquet.json.12345.tmp",
    ]
    for path in [*others, *leftovers]:
        path.write_bytes(b"half")
    build_datasets(recipe)
    assert not any(path.exists() for path in leftovers)
    assert all(path.read_bytes() == b"half" for path in others)
    for path in others:
        path.unlink()
    assert before.keys() <= (list_files(recipe.output_dir) | list_files(recipe.manifest_dir)).keys()


def test_second_build_into_one_folder_is_refused_and_touches_nothing(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    recipe.output_dir.mkdir(parents=True)
    under_way = recipe.output_dir / ".00001.parquet.12345.tmp"
    under_way.write_bytes(b"half")
    with hold_folder(recipe.output_dir, "build"):
        with pytest.raises(
            ConfigError, match=r"another build is writing into .*Wait for it or stop it, or set another"
        ):
            build_datasets(recipe)
        assert build_datasets(recipe, dry_run=True).datasets
    assert under_way.read_bytes() == b"half"
    build_datasets(recipe)
    assert not under_way.exists()


def test_manifest_that_another_command_writes_is_no_leftover(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    recipe.manifest_dir.mkdir(parents=True, exist_ok=True)
    under_way = recipe.manifest_dir / ".world.parquet.12345.tmp"
    under_way.write_bytes(b"half")
    with share_folder(recipe.manifest_dir):
        build_datasets(recipe)
        assert under_way.exists()
    build_datasets(recipe)
    assert not under_way.exists()


def test_folder_of_somebody_else_is_refused_even_when_overwriting(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    mine = recipe.output_dir / PAIRS / "mine.parquet"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=rf"{PAIRS} exists but was not built here"):
            build_datasets(recipe, overwrite=overwrite)
    assert mine.read_bytes() == b"mine"

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from chatreid_plugin.images import PatchGeometry
from chatreid_plugin.records import Answer, ImageReference, Instruction
from chatreid_plugin.training import recipe_data
from chatreid_plugin.training.recipe import Recipe
from chatreid_plugin.training.recipe_data import check_datasets, draw_sample, find_token_counter, spread


ReadRecipe = Callable[..., Recipe]
CAPTIONING = "chatreid_stage1_image_captioning"
MANY = "chatreid_stage2_image_to_image_many_to_many"


@pytest.fixture
def dataset_dir(workshop: Any, tmp_path: Path) -> Path:
    """Return a copy of the workshop's data sets, beside which the images' folder is a link."""
    (tmp_path / workshop.images.name).symlink_to(workshop.images)
    return shutil.copytree(workshop.dataset_dir, tmp_path / "dataset_info")


def find_faults(recipe: Recipe) -> list[tuple[str, str]]:
    return [(finding.state, finding.render()) for finding in check_datasets(recipe) if finding.state != "ok"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_built_data_have_no_fault(read_recipe: ReadRecipe, stage: int) -> None:
    recipe = read_recipe(stage)
    findings = check_datasets(recipe)
    assert {finding.state for finding in findings} == {"ok"}
    assert len(findings) == 3 * len(recipe.data.dataset)


def test_missing_folder_and_missing_entry_are_errors(read_recipe: ReadRecipe, tmp_path: Path) -> None:
    ((state, text),) = find_faults(read_recipe(1, dataset_dir=tmp_path / "nowhere"))
    assert state == "error" and "is not a folder" in text
    ((state, text),) = find_faults(read_recipe(1, dataset=f"{CAPTIONING},misspelt"))
    assert state == "error" and "1 of 2 data set(s) are not in" in text and ": misspelt. Build" in text
    assert f"train on what is there: dataset={CAPTIONING}" in text
    ((state, text),) = find_faults(read_recipe(1, eval_dataset="misspelt"))
    assert ": misspelt. Build" in text
    ((state, text),) = find_faults(read_recipe(1, dataset_dir="ONLINE"))
    assert state == "warning"


def test_data_set_of_a_version_without_dialogues_has_no_fault(read_recipe: ReadRecipe, dataset_dir: Path) -> None:
    for shard in (dataset_dir / CAPTIONING).glob("*.parquet"):
        pq.write_table(pq.read_table(shard).drop_columns("turns"), shard)
    assert find_faults(read_recipe(1, dataset_dir=dataset_dir)) == []


def test_incomplete_data_set_is_an_error(read_recipe: ReadRecipe, dataset_dir: Path) -> None:
    recipe = read_recipe(1, dataset_dir=dataset_dir)
    assert find_faults(recipe) == []
    provenance = dataset_dir / f"{CAPTIONING}.json"
    content = json.loads(provenance.read_text())
    provenance.write_text(json.dumps(content | {"complete": False}))
    ((state, text),) = find_faults(recipe)
    assert state == "error" and "half-built" in text
    provenance.write_text(json.dumps(content))
    assert find_faults(recipe) == []
    shard = next((dataset_dir / CAPTIONING).glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    ((state, text),) = find_faults(recipe)
    assert state == "error" and "cut short" in text


def test_missing_images_are_an_error(read_recipe: ReadRecipe, tmp_path: Path, workshop: Any) -> None:
    ((state, text),) = find_faults(read_recipe(1, media_dir=tmp_path))
    assert state == "error" and f"images {CAPTIONING}" in text and "Set media_dir" in text
    assert find_faults(read_recipe(1, media_dir=workshop.images)) == []


def test_record_that_does_not_fit_its_task_is_an_error(
    read_recipe: ReadRecipe, write_dataset: Callable[..., Path], tmp_path: Path, workshop: Any
) -> None:
    image = next(path for path in workshop.images.rglob("*.jpg"))
    reference = ImageReference(str(image.relative_to(workshop.images)), 64, 128)
    record = Instruction("made-0", "image_captioning", (reference,), 1, Answer(text="A man."))
    write_dataset(tmp_path / "data", [record], workshop.images)
    recipe = read_recipe(1, dataset_dir=tmp_path / "data", dataset="made")
    assert find_faults(recipe) == []
    write_dataset(tmp_path / "data", [record, replace(record, answer=Answer())], workshop.images)
    ((state, text),) = find_faults(recipe)
    assert state == "error" and "Record made-0" in text and "no answer text" in text


def test_record_over_the_cutoff_is_an_error_unless_it_is_trimmed(read_recipe: ReadRecipe) -> None:
    longest = max(int(text.split(" has ")[1].split()[0]) for text in list_lengths(read_recipe(2, dataset=MANY)))
    fits = {"dataset": MANY, "cutoff_len": longest}
    short = {"dataset": MANY, "cutoff_len": longest - 1}
    assert find_faults(read_recipe(2, **fits)) == []
    ((state, text),) = find_faults(read_recipe(2, **short, chatreid_over_cutoff="raise"))
    assert state == "error" and f"Set cutoff_len: {-(-longest // 8) * 8}" in text
    ((state, text),) = find_faults(read_recipe(2, **short, chatreid_over_cutoff="trim"))
    assert state == "warning" and "trimmed" in text


def list_lengths(recipe: Recipe) -> list[str]:
    return [finding.found for finding in check_datasets(recipe) if finding.check.startswith("length")]


@pytest.mark.parametrize(
    ("stage", "name"),
    [(1, CAPTIONING), (2, MANY), (3, "chatreid_stage3_standard_reid"), (3, "chatreid_stage3_dialogue_retrieval")],
)
def test_token_counts_are_llamafactorys(
    read_recipe: ReadRecipe, load_rows: Callable[..., Any], stage: int, name: str
) -> None:
    limits = {"image_max_pixels": 589824, "dataset": name}
    recipe = read_recipe(stage, dataset=name)
    rows = load_rows(stage, **limits)
    sample = draw_sample(find_attributes(recipe, name), recipe.data)
    count = find_token_counter(recipe)
    assert len(rows) == len(sample.records) == sample.total
    expected = [len(rows[position]["input_ids"]) for position in range(len(rows))]
    assert [count(sample, record) for record in sample.records] == expected


def find_attributes(recipe: Recipe, name: str) -> Any:
    from llamafactory.data.parser import get_dataset_list

    return get_dataset_list([name], recipe.data.dataset_dir)[0]


def test_without_the_model_lengths_are_estimated(read_recipe: ReadRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(1)
    sample = draw_sample(find_attributes(recipe, CAPTIONING), recipe.data)
    exact = find_token_counter(recipe)(sample, sample.records[0])
    monkeypatch.setattr(recipe_data, "find_model_folder", lambda name, model_args: None)
    assert 0.5 * exact < find_token_counter(recipe)(sample, sample.records[0]) < 3 * exact


def test_sample_spreads_over_shards_and_rows(
    read_recipe: ReadRecipe, dataset_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dataset_dir / CAPTIONING
    shard = next(folder.glob("*.parquet"))
    for number in range(1, 5):
        shutil.copy(shard, folder / f"copy-{number}.parquet")
    monkeypatch.setattr(recipe_data, "SAMPLED_SHARDS", 2)
    monkeypatch.setattr(recipe_data, "SAMPLED_RECORDS", 6)
    recipe = read_recipe(1, dataset_dir=dataset_dir)
    sample = draw_sample(find_attributes(recipe, CAPTIONING), recipe.data)
    assert (sample.total, len(sample.records)) == (80, 6)
    assert len({record.id for record in sample.records}) == 3  # the first, middle and last of two equal shards


def test_spread_has_both_ends() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(101, 5) == [0, 25, 50, 75, 100]
    assert spread(0, 5) == []


def test_foreign_data_set_needs_the_eager_mode(read_recipe: ReadRecipe, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "a.json", "formatting": "alpaca"}}))
    changes = {"dataset_dir": tmp_path, "dataset": "mine"}
    ((state, text),) = find_faults(read_recipe(1, **changes))
    assert state == "error" and "chatreid_lazy: false" in text
    assert find_faults(read_recipe(1, **changes, chatreid_lazy=False)) == []


def test_records_in_other_files_are_not_read(read_recipe: ReadRecipe, dataset_dir: Path) -> None:
    for shard in (dataset_dir / CAPTIONING).iterdir():
        shard.rename(shard.with_suffix(".jsonl"))
    ((state, text),) = find_faults(read_recipe(1, dataset_dir=dataset_dir))
    assert state == "warning" and "not looked at" in text


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (None, {}, PatchGeometry()),
        ("preprocessor_config.json", {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}, (14, 2, 3136)),
        ("processor_config.json", {"image_processor": {"patch_size": 16, "size": {"shortest_edge": 9}}}, (16, 2, 9)),
    ],
)
def test_geometry_is_read_from_either_file(
    tmp_path: Path, file: str | None, content: dict[str, Any], expected: Any
) -> None:
    if file is not None:
        (tmp_path / file).write_text(json.dumps(content))
    geometry = recipe_data.read_patch_geometry(tmp_path)
    if isinstance(expected, tuple):
        assert (geometry.patch_size, geometry.merge_size, geometry.min_pixels) == expected
    else:
        assert geometry == expected

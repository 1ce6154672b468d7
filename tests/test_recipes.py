"""What we ship and show: every recipe of the data engine validates, and the README names files that exist."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from chatreid_plugin.config import BuildSettings, HardNegatives, load_settings
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.images import ImagePolicy, count_visual_tokens
from chatreid_plugin.tasks import list_stage_tasks


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["data_engine.yaml", "data_engine_full.yaml", "folder_of_crops.yaml"])
def test_recipe_of_the_data_engine_validates(name: str) -> None:
    settings = load_settings(ROOT / "examples" / name, [], BuildSettings)
    assert set(settings.records) == {"stage1", "stage2", "stage3"}
    assert set(settings.stage2_ratios) == {task.name for task in list_stage_tasks(2)}


def test_recipe_in_the_readme_validates(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(# my_crops\.yaml\n.*?)```", README, re.DOTALL)
    assert block is not None
    path = tmp_path / "my_crops.yaml"
    path.write_text(block.group(1), encoding="utf-8")
    settings = load_settings(path, [], BuildSettings)
    assert settings.sources[0].pattern == "{person}/{camera}_{index}.png"


def test_readme_names_files_that_exist() -> None:
    names = set(re.findall(r"(?:examples|eval)/[a-z0-9_]+\.yaml", README))
    assert {"examples/stage1.yaml", "examples/stage2.yaml", "examples/stage3.yaml", "eval/market1501.yaml"} <= names
    assert [name for name in sorted(names) if not (ROOT / name).is_file()] == []


def test_table_of_small_crops_says_what_they_cost() -> None:
    rows = re.findall(r"^\| (\d+)x(\d+) \| (\d+) \| (\d+) \| (\d+) \|$", EXAMPLES, re.MULTILINE)
    assert len(rows) == 4
    for height, width, *said in rows:
        for aspect in ("stretch", "keep") if int(height) == 2 * int(width) else ("stretch",):
            first, second, third = (
                count_visual_tokens(int(width), int(height), ImagePolicy(stage, aspect)) for stage in (1, 2, 3)
            )
            assert [first, second] == [int(count) for count in said[:2]] and second == third
        for stage in (2, 3):
            enlarged = ImagePolicy(stage, image_min_pixels=32768)
            assert count_visual_tokens(int(width), int(height), enlarged) == int(said[2])


def test_override_for_hard_negatives_by_features_is_taken() -> None:
    (override,) = re.findall(r"'(gallery\.hard_negatives\.from=[^']*)'", EXAMPLES)
    for name in ("data_engine.yaml", "data_engine_full.yaml"):
        settings = load_settings(ROOT / "examples" / name, [override], BuildSettings)
        assert settings.gallery.hard_negatives == HardNegatives(share=0.25, looks="features/{source}.npz")


@pytest.mark.parametrize("name", ["cuhkpedes", "icfgpedes", "rstpreid"])
def test_text_benchmark_says_how_many_pairs_it_scores(name: str) -> None:
    text = (ROOT / "eval" / f"{name}.yaml").read_text(encoding="utf-8")
    captions, images = (
        int(re.findall(rf"([\d,]+) {what}", text)[0].replace(",", "")) for what in ("captions", "images")
    )
    every, filtered = (float(count) * 1e6 for count in re.findall(r"([\d.]+) million", text))
    assert [every, filtered] == pytest.approx([captions * images, captions * 100], rel=0.03)
    assert f"{every / 1e6:g} million" in (ROOT / "eval" / "README.md").read_text(encoding="utf-8")


def test_table_of_three_sizes_has_the_records_and_steps_of_the_recipes() -> None:
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", EXAMPLES, re.MULTILINE))
    cells = {name: row.split(" | ") for name, row in rows.items() if row.count(" | ") == 2}
    for command, gpus, records, steps in zip(
        cells["recipe of `chatreid build`"],
        cells["GPUs"],
        cells["records in Stages 1, 2, 3"],
        cells["steps of the shipped batches"],
        strict=True,
    ):
        name, *overrides = command.strip("`").split()
        settings = load_settings(ROOT / "examples" / name, overrides, BuildSettings)
        assert records.split(", ") == [f"{count:,}" for count in settings.records.values()]
        batches: list[int] = []
        for stage in (1, 2, 3):
            recipe = yaml.safe_load((ROOT / "examples" / f"stage{stage}.yaml").read_text(encoding="utf-8"))
            batch = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * int(gpus)
            batches.append(-(-settings.records[f"stage{stage}"] // batch))
        assert steps.split(", ") == [f"{count:,}" for count in batches]


def find_value(command: list[str], key: str) -> str:
    return next(word.partition("=")[2] for word in command if word.startswith(f"{key}="))


def test_every_evaluation_finds_the_manifests_and_models_that_recipes_and_loop_make(
    split_commands: Callable[[int], list[list[str]]],
) -> None:
    """Run for real in ``tests/e2e/test_full_recipe.py``."""
    made = {"saves/qwen2vl-2b/full/stage3"}
    for recipe in ("data_engine_full", "folder_of_crops"):
        settings = load_settings(ROOT / "examples" / f"{recipe}.yaml", [], BuildSettings)
        made |= {f"{settings.manifest_dir}/{source.name}.parquet" for source in settings.sources}
    for command in split_commands(20):
        if command[0] == "chatreid":
            source = load_settings(ROOT / command[2], command[3:], BuildSettings).sources[0]
            assert source.name.endswith(str(source.trial))
            made.add(f"manifests/{source.name}.parquet")
        else:
            made.add(find_value(command, "output_dir"))
    asked: set[str] = set()
    for path in (ROOT / "eval").glob("*.yaml"):
        evaluation = load_settings(path, [], EvalSettings)
        names = (str(evaluation.data.manifest), str(evaluation.model.model_name_or_path))
        asked |= {name.replace("{trial}", str(trial)) for name in names for trial in evaluation.data.splits or (0,)}
    assert len(asked) > 60
    assert asked <= made

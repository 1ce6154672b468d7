import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.training.recipe import Finding, Recipe, parse_recipe, read_values


ReadRecipe = Callable[..., Recipe]


def test_overrides_replace_values_and_null_removes_one(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("learning_rate: 1e-5\ndeepspeed: a.json\naccelerator_config: {split_batches: true}\n")
    values = read_values(path, ["deepspeed=null", "cutoff_len=512", "accelerator_config.dispatch_batches=false"])
    assert values == {
        "learning_rate": 1e-5,
        "deepspeed": None,
        "cutoff_len": 512,
        "accelerator_config": {"split_batches": True, "dispatch_batches": False},
    }


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (None, [], "does not exist"),
        ("a: [1", [], "cannot be read as YAML"),
        ("- a\n- b\n", [], "cannot be read as YAML: it must have keys"),
        ("3", [], "cannot be read as YAML: it must have keys"),
        ("a: 1", ["b=" + "[" * 700], "the overrides cannot be read as YAML"),
        ("a: 1", ["b"], "written key=value; found b"),
    ],
)
def test_unreadable_recipe_is_one_error(
    tmp_path: Path, content: str | None, overrides: list[str], message: str
) -> None:
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_values(path, overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_vison_tower": False}, "unknown key freeze_vison_tower .meant freeze_vision_tower"),
        ({"cutoff_len": "long"}, "cutoff_len: 'long' is not a whole number"),
        ({"chatreid_lazy": "perhaps"}, "chatreid_lazy: 'perhaps' is not true or false"),
        ({"learning_rate": "small"}, "learning_rate: 'small' is not a number"),
        ({"mix_strategy": "shuffle"}, "mix_strategy: 'shuffle' is not one of"),
        ({"finetuning_type": "partial"}, "finetuning_type: 'partial' is not one of"),
        ({"save_strategy": "sometimes"}, "LLaMA-Factory refuses the recipe: sometimes is not a valid"),
        ({"dataset": None}, "LLaMA-Factory refuses the recipe: Please specify dataset"),
        ({"streaming": True, "max_steps": -1}, "specify `max_steps` in streaming mode"),
        ({"chatreid_encoder": "x"}, "decoder is swapped in Stage 2 only"),
        ({"template": "qwen2_vl"}, "needs `template: chatreid`"),
    ],
)
def test_refused_values_are_named(read_recipe: ReadRecipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(1, **changes)


def test_parse_needs_no_gpu_and_starts_no_process_group(
    read_recipe: ReadRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    recipe = read_recipe(2, bf16=True, use_cpu=False, deepspeed="examples/deepspeed/ds_z2_config.json")
    assert not torch.distributed.is_initialized()
    assert recipe.training.world_size == 1
    assert (recipe.values["bf16"], recipe.values["use_cpu"]) == (True, False)
    assert os.environ["WORLD_SIZE"] == "2"
    assert not (tmp_path / "out").exists()  # nothing was composed


def test_cutoff_len_is_the_written_one(read_recipe: ReadRecipe) -> None:
    recipe = read_recipe(1, neat_packing=True, chatreid_lazy=False, cutoff_len=1000)
    assert recipe.cutoff_len == 1000
    assert recipe.data.cutoff_len == 999  # LLaMA-Factory's own


def test_deepspeed_is_a_file_or_a_mapping(read_recipe: ReadRecipe, tmp_path: Path) -> None:
    assert read_recipe(1).read_deepspeed() is None
    assert read_recipe(1, deepspeed="{train_batch_size: auto}").read_deepspeed() == {"train_batch_size": "auto"}
    path = tmp_path / "ds.json"
    with pytest.raises(DataError, match="does not exist"):
        read_recipe(1, deepspeed=path).read_deepspeed()
    path.write_text("{,}")
    with pytest.raises(DataError, match="not valid JSON"):
        read_recipe(1, deepspeed=path).read_deepspeed()
    path.write_text("[]")
    with pytest.raises(ConfigError, match="no JSON object"):
        read_recipe(1, deepspeed=path).read_deepspeed()


def test_finding_is_one_line() -> None:
    assert Finding("stage", "ok", "2").render() == "ok       stage: 2"
    assert Finding("stage", "error", "odd", "Mend it").render() == "error    stage: odd. Mend it"


def test_missing_recipe_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chatreid init"):
        parse_recipe(tmp_path / "a.yaml", [])

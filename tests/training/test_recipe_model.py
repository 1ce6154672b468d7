import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from chatreid_plugin.checkpoints import read_shapes
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.training import recipe_model
from chatreid_plugin.training.recipe import Recipe
from chatreid_plugin.training.recipe_model import (
    GIBIBYTE,
    ParameterCounts,
    check_checkpoints,
    check_memory,
    count_parameters,
    estimate_memory,
    find_model_folder,
    judge_memory,
    list_process_counts,
)


ReadRecipe = Callable[..., Recipe]


@pytest.fixture
def model(workshop: Any, tmp_path: Path) -> Path:
    return shutil.copytree(workshop.model, tmp_path / "model")


def find_faults(recipe: Recipe) -> list[tuple[str, str, str]]:
    return [(f.check, f.state, f.found) for f in check_checkpoints(recipe) if f.state != "ok"]


def test_sound_checkpoints_have_no_fault(read_recipe: ReadRecipe) -> None:
    findings = check_checkpoints(read_recipe(2))
    assert [(finding.check, finding.state) for finding in findings] == [
        ("model_name_or_path", "ok"),
        ("chatreid_encoder", "ok"),
        ("chatreid_encoder", "ok"),
    ]


def test_template_of_another_family_is_an_error(read_recipe: ReadRecipe, model: Path) -> None:
    assert find_faults(read_recipe(1, model_name_or_path=model, template="chatreid_qwen3_vl")) == [
        ("template", "error", "template chatreid_qwen3_vl is not of the model's family qwen2_vl")
    ]
    assert find_faults(read_recipe(1, model_name_or_path=model, template="chatreid_qwen2_5_vl")) == []


def test_missing_folder_is_an_error(read_recipe: ReadRecipe, tmp_path: Path) -> None:
    faults = find_faults(read_recipe(2, chatreid_encoder=tmp_path / "nowhere"))
    assert faults == [("chatreid_encoder", "error", f"{tmp_path}/nowhere is not a folder")]


def test_hub_name_that_is_not_here_is_a_warning(read_recipe: ReadRecipe, tmp_path: Path) -> None:
    changes = {"model_name_or_path": "nobody/no-model", "cache_dir": tmp_path}
    ((check, state, found),) = find_faults(read_recipe(1, **changes))
    assert (check, state) == ("model_name_or_path", "warning") and "downloaded" in found
    assert check_memory(read_recipe(1, **changes))[0].state == "warning"


def test_deepspeed_shards_alone_are_an_error(read_recipe: ReadRecipe, model: Path) -> None:
    recipe = read_recipe(1, model_name_or_path=model)
    assert find_faults(recipe) == []
    (model / "model.safetensors").unlink()
    (model / "global_step4").mkdir()
    ((check, state, found),) = find_faults(recipe)
    assert (check, state) == ("model_name_or_path", "error") and "zero_to_fp32.py" in found
    assert check_memory(recipe) == []


def test_missing_configuration_and_missing_part_are_errors(read_recipe: ReadRecipe, model: Path) -> None:
    recipe = read_recipe(1, model_name_or_path=model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_faults(recipe) == []
    index["weight_map"]["more"] = "a.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 tensor(s) of its index are in no file, first more" in find_faults(recipe)[0][2]
    index["weight_map"]["more"] = "b.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.safetensors is not a readable" in find_faults(recipe)[0][2]
    del tensors[min(tensors)]
    (model / "model.safetensors.index.json").unlink()
    save_file(tensors, model / "model.safetensors")
    assert "lacks 1 of the model's parameters" in find_faults(recipe)[0][2]
    (model / "config.json").unlink()
    assert "config.json does not exist" in find_faults(recipe)[0][2]


def test_encoder_of_another_model_is_an_error(
    read_recipe: ReadRecipe, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(2, chatreid_encoder=model)
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "visual." in name and tensors[name].ndim == 2)
    save_file(tensors | {name: tensors[name][:4].clone()}, model / "model.safetensors")
    assert f"{name} with shape (4, 32) is no tensor of the model" in find_faults(recipe)[0][2]
    monkeypatch.setattr(recipe_model, "check_completeness", lambda folder: None)  # as with another config.json
    ((check, state, found),) = find_faults(recipe)
    assert (check, state) == ("chatreid_encoder", "error") and "1 tensor(s) differ" in found
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_vl"}))
    assert f"The encoder {model} is a qwen2_5_vl" in find_faults(recipe)[0][2]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {}),
        (3, {}),
        (3, {"chatreid_projector": "decoder", "freeze_multi_modal_projector": False}),
        (2, {"finetuning_type": "lora", "lora_rank": 4, "freeze_vision_tower": True}),
        (2, {"finetuning_type": "lora", "lora_rank": 4}),
        (2, {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj"}),
    ],
)
def test_counts_are_those_of_the_loaded_model(
    read_recipe: ReadRecipe, tokenizer_module: dict[str, Any], workshop: Any, stage: int, changes: dict[str, Any]
) -> None:
    from llamafactory.model import load_model

    recipe = read_recipe(stage, **changes)
    counts = count_parameters(recipe, read_shapes(workshop.model))
    model = load_model(tokenizer_module["tokenizer"], recipe.model, recipe.finetuning, is_trainable=True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert counts == ParameterCounts(trained, frozen)


def test_other_tuning_is_not_estimated(read_recipe: ReadRecipe) -> None:
    (finding,) = check_memory(read_recipe(1, finetuning_type="freeze"))
    assert finding.state == "warning" and "not estimated: for freeze tuning" in finding.found


@pytest.mark.parametrize(
    ("deepspeed", "processes", "expected"),
    [
        (None, 4, 16 * 1000 + 2 * 600),  # replicas in float32
        ("{zero_optimization: {stage: 1}}", 4, (2 + 2 + 12 / 4) * 1000 + 2 * 600),
        ("{zero_optimization: {stage: 2}}", 4, (2 + (2 + 12) / 4) * 1000 + 2 * 600),
        ("{zero_optimization: {stage: 3}}", 4, 16 / 4 * 1000 + 2 / 4 * 600),
        ("{zero_optimization: {stage: 3}}", 1, 16 * 1000 + 2 * 600),
        ("{zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}", 1, 4 * 1000 + 2 * 600),
        (
            "{zero_optimization: {stage: 3, offload_optimizer: {device: cpu}, offload_param: {device: cpu}}}",
            1,
            2 * 1000,
        ),
    ],
)
def test_estimate_follows_the_zero_paper(
    read_recipe: ReadRecipe, deepspeed: str | None, processes: int, expected: float
) -> None:
    recipe = read_recipe(1, bf16=True, deepspeed=deepspeed)
    assert estimate_memory(recipe, ParameterCounts(1000, 600), processes) == expected


def test_estimate_follows_the_precision(read_recipe: ReadRecipe) -> None:
    counts = ParameterCounts(1000, 600)
    assert estimate_memory(read_recipe(1), counts, 1) == 16 * 1000 + 4 * 600
    assert estimate_memory(read_recipe(1, pure_bf16=True), counts, 1) == 8 * 1000 + 2 * 600


def test_need_is_judged_by_the_gpus_memory(read_recipe: ReadRecipe) -> None:
    available = 100 * GIBIBYTE
    assert [judge_memory("", need * GIBIBYTE, available).state for need in (79, 81, 101)] == ["ok", "warning", "error"]
    assert judge_memory("", 101 * GIBIBYTE, None).state == "ok"
    (finding,) = check_memory(read_recipe(1))
    assert "activations not included" in finding.found


def test_processes_are_counted_as_the_launcher_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPROC_PER_NODE", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    assert list_process_counts(0) == [1, 8]
    assert list_process_counts(4) == [4]
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setenv("NNODES", "3")
    assert list_process_counts(4) == [6]


def test_cached_hub_model_is_found(read_recipe: ReadRecipe, workshop: Any, tmp_path: Path) -> None:
    recipe = read_recipe(1, cache_dir=tmp_path)
    assert find_model_folder("some/model", recipe.model) is None
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(workshop.model, snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    assert find_model_folder("some/model", recipe.model) == snapshot
    with pytest.raises(ConfigError, match="not a folder"):
        find_model_folder("./model", recipe.model)

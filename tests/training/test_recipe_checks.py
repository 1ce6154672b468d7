"""Each check of a recipe's values: what it finds in a recipe with that fault alone, and nothing once it is mended."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.training import recipe_checks
from chatreid_plugin.training.recipe import Finding, Recipe
from chatreid_plugin.training.recipe_checks import CHECKS
from chatreid_plugin.training.tokenized_path import STAMP


ReadRecipe = Callable[..., Recipe]
ARGUMENT_CHECKS = [check for check in CHECKS if check.__module__ == recipe_checks.__name__]
STREAMING = {"streaming": True, "chatreid_lazy": False, "chatreid_over_cutoff": "raise"}
PACKING: dict[str, Any] = {"chatreid_lazy": False, "ddp_timeout": 9999, "cutoff_len": 1008}
EACH: dict[str, Any] = {
    "eval_dataset": "chatreid_stage1_image_captioning",
    "eval_on_each_dataset": True,
    "eval_strategy": "steps",
    "eval_steps": 1000,
}
DISPATCH = {"accelerator_config": "{dispatch_batches: false}"}


def find_faults(recipe: Recipe) -> list[Finding]:
    findings = [finding for check in ARGUMENT_CHECKS for finding in check(recipe)]
    findings += recipe_checks.check_image_limits(recipe, None)
    return [finding for finding in findings if finding.state != "ok"]


@pytest.mark.parametrize(
    ("stage", "changes", "check", "state", "message"),
    [
        (1, {"freeze_vision_tower": True}, "stage", "error", "Stage 1 trains the vision, but freeze_vision_tower is"),
        (2, {"freeze_multi_modal_projector": True}, "stage", "error", "Set freeze_multi_modal_projector: false"),
        (3, {"freeze_vision_tower": False}, "stage", "error", "Stage 3 freezes the vision"),
        (3, {"freeze_vision_tower": False, "finetuning_type": "lora"}, "stage", "error", "Stage 3 freezes"),
        (3, {"chatreid_projector": "decoder"}, "stage", "error", "Stage 3 trains the projector"),
        (2, {"finetuning_type": "lora"}, "stage", "error", "lora never reaches the projector"),
        (1, {"chatreid_stage": None}, "stage", "warning", "no chatreid_stage"),
        (2, {"chatreid_encoder": None}, "decoder swap", "warning", "own encoder trains"),
        (
            1,
            {"neat_packing": True, "cutoff_len": 1001, "chatreid_lazy": False, "ddp_timeout": 9999},
            "packing",
            "error",
            "Set cutoff_len: 1008",
        ),
        (1, PACKING | {"packing": True}, "packing", "warning", "attend to each other. Set neat_packing: true"),
        (
            1,
            PACKING | {"stage": "pt"},
            "records",
            "error",
            "stage: pt cannot train on ChatReID records (chatreid_stage1_",
        ),
        (1, {"stage": "kto"}, "records", "error", "Set stage: sft"),
        (1, EACH | {"load_best_model_at_end": True}, "evaluation", "error", "eval_chatreid_stage1_image_captioning_"),
        (1, EACH | {"metric_for_best_model": "eval_loss"}, "evaluation", "error", "gives no eval_loss for the best"),
        (1, EACH | {"lr_scheduler_type": "reduce_lr_on_plateau"}, "evaluation", "error", "gives no loss for the best"),
        (1, {"val_size": 0.1}, "evaluation", "warning", "records, not people"),
        (1, {"mix_strategy": "interleave_once"}, "mixing", "error", "raises ValueError"),
        (1, STREAMING | {"dataloader_num_workers": 1}, "streaming", "error", "dispatch_batches: false"),
        (1, STREAMING | DISPATCH, "streaming", "error", "StopIteration"),
        (1, STREAMING | DISPATCH | {"dataloader_num_workers": 1}, "streaming", "warning", "Prefer chatreid_lazy"),
        (
            1,
            {"neat_packing": True, "cutoff_len": 1008},
            "lazy mode",
            "error",
            "chatreid_lazy: true and packing exclude",
        ),
        (1, {"tokenized_path": "no/such"}, "lazy mode", "error", "chatreid_lazy: true and tokenized_path exclude"),
        (1, {"include_effective_tokens_per_second": True}, "lazy mode", "warning", "reads and decodes every record"),
        (
            1,
            {"chatreid_vision_learning_rate": 1.0e-6, "use_muon": True},
            "encoder rate",
            "error",
            "does not work with use_muon",
        ),
        (
            1,
            {"chatreid_lazy": False, "ddp_timeout": 9999, "preprocessing_num_workers": 4096},
            "tokenization",
            "warning",
            "preprocessing_num_workers: 4096",
        ),
        (1, {"chatreid_lazy": False, "ddp_timeout": 1800}, "tokenization", "warning", "wait 1800 s"),
        (1, {"deepspeed": "{train_micro_batch_size_per_gpu: 64}"}, "DeepSpeed", "error", "64 in the file, 2 in the"),
        (1, {"deepspeed": "{train_batch_size: 64}"}, "DeepSpeed", "warning", "one number of GPUs only"),
        (1, {"resume_from_checkpoint": "no/such"}, "output", "error", "no/such is not a folder"),
        (1, {"image_min_pixels": 32768}, "image limits", "warning", "32768 here, 1024 in inference files"),
    ],
)
def test_check_finds_its_fault_alone(
    read_recipe: ReadRecipe, stage: int, changes: dict[str, Any], check: str, state: str, message: str
) -> None:
    faults = find_faults(read_recipe(stage, **changes))
    assert {(fault.check, fault.state) for fault in faults} == {(check, state)}
    assert any(message in fault.render() for fault in faults)
    assert all(fault.advice or "Set resume_from_checkpoint" in fault.found for fault in faults)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (3, {"chatreid_projector": "decoder", "freeze_multi_modal_projector": False}),
        (2, {"finetuning_type": "lora", "freeze_vision_tower": True, "freeze_multi_modal_projector": True}),
        (2, {"finetuning_type": "lora", "additional_target": "merger"}),
        (1, {"neat_packing": True, "cutoff_len": 1008, "chatreid_lazy": False, "ddp_timeout": 9999}),
        (
            1,
            {"chatreid_lazy": False, "ddp_timeout": 9999, "preprocessing_num_workers": 1, "tokenized_path": "no/such"},
        ),
        (1, {"mix_strategy": "interleave_over"}),
        (1, EACH),
        (1, EACH | {"load_best_model_at_end": True, "metric_for_best_model": "chatreid_stage1_image_captioning_loss"}),
        (1, EACH | {"eval_on_each_dataset": False, "load_best_model_at_end": True}),
        (1, {"deepspeed": "examples/deepspeed/ds_z2_config.json"}),
        (1, {"deepspeed": "{train_micro_batch_size_per_gpu: 2, gradient_accumulation_steps: 1}"}),
    ],
)
def test_sound_recipe_has_no_fault(read_recipe: ReadRecipe, stage: int, changes: dict[str, Any]) -> None:
    assert find_faults(read_recipe(stage, **changes)) == []


def test_predicting_each_data_set_is_refused(read_recipe: ReadRecipe) -> None:
    recipe = read_recipe(1, **EACH)
    recipe.training.do_predict = True  # parsing it needs packages of LLaMA-Factory's extra [metrics]
    (fault,) = find_faults(recipe)
    assert (fault.check, fault.state, fault.advice) == ("evaluation", "error", "Set eval_on_each_dataset: false")
    recipe.data.eval_on_each_dataset = False
    assert find_faults(recipe) == []


def test_stock_template_is_a_warning(read_recipe: ReadRecipe) -> None:
    stock = {"chatreid_stage": None, "template": "qwen2_vl", "dataset": "any"}
    faults = find_faults(read_recipe(1, **stock))
    assert {(fault.check, fault.state) for fault in faults} == {("stage", "warning"), ("template", "warning")}


def test_tokenized_path_is_compared(read_recipe: ReadRecipe, load_rows: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "tokenized"
    changes = {"chatreid_lazy": False, "ddp_timeout": 9999, "tokenized_path": str(folder), "image_max_pixels": 589824}
    load_rows(1, **changes)
    del changes["image_max_pixels"]  # read_recipe's own
    assert find_faults(read_recipe(1, **changes)) == []
    ((check, state, found),) = [
        (fault.check, fault.state, fault.found) for fault in find_faults(read_recipe(1, **changes, cutoff_len=1024))
    ]
    assert (check, state) == ("tokenized_path", "error") and "made with other cutoff_len" in found
    (folder / STAMP).unlink()
    assert "written whole" in find_faults(read_recipe(1, **changes))[0].found
    stock = find_faults(read_recipe(1, **changes, chatreid_stage=None, template="qwen2_vl"))
    assert ("tokenized_path", "warning") in [(fault.check, fault.state) for fault in stock]
    shutil.rmtree(folder)
    assert find_faults(read_recipe(1, **changes)) == []


def test_output_folder_with_an_earlier_run(read_recipe: ReadRecipe, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "checkpoint-4").mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
        (output / "checkpoint-4" / name).touch()
    overwriting = read_recipe(1)
    assert "set resume_from_checkpoint" in find_faults(overwriting)[0].advice
    assert find_faults(read_recipe(1, resume_from_checkpoint=output / "checkpoint-4")) == []
    going_on = find_faults(read_recipe(1, overwrite_output_dir=False))
    assert [(fault.state, fault.check) for fault in going_on] == [("warning", "output")]
    assert "goes on from checkpoint-4" in going_on[0].found
    (output / "checkpoint-4" / "optimizer.pt").unlink()  # as with save_only_model
    for changes in ({"overwrite_output_dir": False}, {"resume_from_checkpoint": output / "checkpoint-4"}):
        (fault,) = find_faults(read_recipe(1, **changes))
        assert fault.state == "error" and f"model_name_or_path: {output / 'checkpoint-4'}" in fault.found
    (output / "checkpoint-4").rename(tmp_path / "elsewhere")
    assert find_faults(overwriting) == []
    (output / "model.safetensors").touch()
    finished = find_faults(read_recipe(1, overwrite_output_dir=False))
    assert [(fault.state, fault.check) for fault in finished] == [("error", "output")]


def test_limits_left_out_are_a_warning(read_recipe: ReadRecipe) -> None:
    recipe = read_recipe(1)
    del recipe.values["image_max_pixels"]
    assert [fault.found for fault in find_faults(recipe)] == ["image_max_pixels not given"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("image_max_pixels: 589824", None),
        ("image_max_pixels: 8192", "image_max_pixels is 589824 here, 8192 in"),
        ("chatreid_aspect: keep", "chatreid_aspect is stretch here, keep in"),
        ("chatreid_stage: 1", "chatreid_stage is 3 here, 1 in"),
    ],
)
def test_compared_file_has_the_same_limits(
    read_recipe: ReadRecipe, tmp_path: Path, line: str, message: str | None
) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text(("" if "stage" in line else "chatreid_stage: 3\n") + line + "\n")
    findings = recipe_checks.check_image_limits(read_recipe(3), path)
    assert [finding.state for finding in findings] == ["ok" if message is None else "error"]
    assert message is None or message in findings[0].found


def test_an_evaluation_is_compared_by_its_section_of_the_model(read_recipe: ReadRecipe, tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text("data: {benchmark: folder}\nmodel: {chatreid_stage: 2}\n")
    (finding,) = recipe_checks.check_image_limits(read_recipe(3), path)
    assert finding.state == "error" and "chatreid_stage is 3 here, 2 in" in finding.found

"""Data sets and checkpoints that are not there: one line as arguments are parsed, with the reason and the remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.shards import LEFT_OUT, read_json, write_json
from chatreid_plugin.training import recipe_model
from chatreid_plugin.training.dataset_info import expand_stages
from chatreid_plugin.training.recipe import Recipe
from chatreid_plugin.training.recipe_data import check_left_out


Parse = Callable[..., Any]
CAPTIONING = "chatreid_stage1_image_captioning"
ONE_TO_ONE = "chatreid_stage2_image_to_image_one_to_one"
MANY_TO_MANY = "chatreid_stage2_image_to_image_many_to_many"
COMPARISON = "chatreid_stage2_attribute_comparison"


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a folder of data sets: those entered, and those left out with their reasons."""

    def write(*entered: str, **left_out: str) -> str:
        folder = tmp_path / "built"
        entry = {"formatting": "chatreid"}
        write_json(folder / "dataset_info.json", {name: entry | {"file_name": name} for name in entered})
        write_json(folder / LEFT_OUT, left_out)
        return str(folder)

    return write


def refuse(parse: Parse, stage: int, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(stage, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_stage_1_without_captions_says_so_and_how_to_go_on(parse: Parse, build: Callable[..., str]) -> None:
    folder = build(ONE_TO_ONE, **{CAPTIONING: "no captions"})
    message = refuse(parse, 1, dataset_dir=folder)
    assert message == (
        f"1 of 1 data set(s) are not in {folder}/dataset_info.json: chatreid_stage1 (left out by `chatreid build`: no "
        "captions). Name captions in the data engine's source (`chatreid caption` writes them) and build again; or "
        "leave Stage 1 out: Stage 2 starts without it with chatreid_encoder=null."
    )


def test_stage_2_names_what_is_there_and_all_that_is_missing_at_once(
    parse: Parse, build: Callable[..., str], tmp_path: Path
) -> None:
    folder = build(ONE_TO_ONE, MANY_TO_MANY, f"{ONE_TO_ONE}_val", **{COMPARISON: "no attributes"})
    named = f"{ONE_TO_ONE},{COMPARISON},{MANY_TO_MANY}"
    message = refuse(parse, 2, dataset_dir=folder, dataset=named, chatreid_encoder=str(tmp_path / "stage1"))
    assert "1 of 3 data set(s)" in message
    assert f"{COMPARISON} (left out by `chatreid build`: no attributes)" in message
    assert f"; or train on what is there: dataset={ONE_TO_ONE},{MANY_TO_MANY}" in message
    assert "_val" not in message
    assert f"chatreid_encoder: {tmp_path / 'stage1'} is not a folder. Train Stage 1 first" in message
    assert "chatreid_encoder=null" in message


def test_stages_name_stands_for_what_was_built_for_it(build: Callable[..., str]) -> None:
    folder = build(ONE_TO_ONE, CAPTIONING, MANY_TO_MANY, f"{ONE_TO_ONE}_val")
    assert expand_stages(["chatreid_stage2"], folder) == [ONE_TO_ONE, MANY_TO_MANY]
    assert expand_stages(["chatreid_stage2"], folder, held_out=True) == [f"{ONE_TO_ONE}_val"]
    assert expand_stages(["mine", "chatreid_stage1", CAPTIONING], folder) == ["mine", CAPTIONING]
    assert expand_stages(["chatreid_stage3"], folder) == ["chatreid_stage3"]
    assert expand_stages(None, folder) is None
    assert expand_stages(["chatreid_stage2"], "ONLINE") == ["chatreid_stage2"]


def test_run_trains_all_of_a_stage_and_says_once_what_is_missing(parse: Parse, workshop: Any) -> None:
    built = [name for name in read_json(workshop.dataset_dir / "dataset_info.json") if "stage3_" in name]
    assert len(built) > 5
    assert parse(3).data.dataset == built
    findings = check_left_out(Recipe(Path(), {}, None, parse(3).data, None, None))
    assert [finding.state for finding in findings] == ["warning"]
    start = (
        "Stage 3 trains 8 of 11 tasks, without cloth_changing_reid (left out by `chatreid build`: no identity in two "
    )
    assert findings[0].found.startswith(start) and "visible_infrared_reid (left out" in findings[0].found
    # Whoever names some data sets has chosen.
    assert check_left_out(Recipe(Path(), {}, None, parse(3, dataset=built[0]).data, None, None)) == []


def test_advice_names_the_stages_other_data_sets_too(parse: Parse, build: Callable[..., str]) -> None:
    pairs = "chatreid_stage3_image_to_image_one_to_one"
    folder = build(pairs, "chatreid_stage3_text_to_image_reid", ONE_TO_ONE)
    message = refuse(parse, 3, dataset_dir=folder, dataset=f"{pairs},chatreid_stage3_standard_reid")
    assert f"dataset={pairs},chatreid_stage3_text_to_image_reid." in message


def test_mistyped_name_and_folder_are_told_from_what_was_left_out(parse: Parse, build: Callable[..., str]) -> None:
    folder = build(CAPTIONING)
    message = refuse(parse, 1, dataset_dir=folder, dataset="misspelt")
    assert "misspelt. Build with `chatreid build`, or correct the name; entered are chatreid_stage1" in message
    message = refuse(parse, 1, dataset_dir=folder, eval_dataset="other", do_train=False, do_eval=True)
    assert "1 of 2 data set(s)" in message and "other" in message
    message = refuse(parse, 1, dataset_dir=f"{folder}/nowhere")
    assert f"dataset_dir: {folder}/nowhere is not a folder. Build the data with `chatreid build`" in message
    (Path(folder) / "dataset_info.json").unlink()
    assert f"dataset_dir: {folder} has no dataset_info.json" in refuse(parse, 1, dataset_dir=folder)


@pytest.mark.parametrize("name", ["saves/qwen2vl-2b/full/stage2", "./stage2", "/nowhere/stage2"])
def test_missing_model_of_stage_3_names_stage_2(parse: Parse, name: str) -> None:
    message = refuse(parse, 3, model_name_or_path=name)
    assert message == (
        f"model_name_or_path: {name} is not a folder. Train Stage 2 first (examples/stage2.yaml), or name another "
        "checkpoint."
    )


def test_hub_name_that_cannot_be_fetched_is_one_line(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def fail(name: str, file: str, **options: Any) -> str:
        asked.append(f"{name}/{file}")
        raise OSError("no network.\nMore about it.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    message = refuse(parse, 1, model_name_or_path="Qwen/Qwen2-VL-2B-Instruct")
    assert "model_name_or_path: Qwen/Qwen2-VL-2B-Instruct is neither a folder nor to be had" in message
    assert "(no network)" in message and asked == ["Qwen/Qwen2-VL-2B-Instruct/config.json"]
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert recipe_model.find_absence("Qwen/Qwen2-VL-2B-Instruct", None) is None


def test_resumed_stage_2_needs_its_own_copy_alone(parse: Parse, workshop: Any, tmp_path: Path) -> None:
    """What Stage 2 was composed from may be gone by then."""
    parsed = parse(2, chatreid_encoder=str(workshop.other_model))
    recipe = Recipe(Path(), {}, parsed.model, parsed.data, parsed.training, parsed.finetuning)
    recipe.data.chatreid_encoder = str(tmp_path / "gone")
    (finding,) = recipe_model.check_starting_points(recipe)
    assert finding.state == "error" and "Train Stage 1 first" in finding.advice
    recipe.training.resume_from_checkpoint = str(tmp_path / "out" / "checkpoint-2")
    assert recipe_model.check_starting_points(recipe) == []


def test_what_llamafactory_refuses_is_a_message_in_our_recipes_alone(parse: Parse) -> None:
    from llamafactory.hparams import get_train_args

    wrong: dict[str, Any] = {"do_predict": True}
    assert refuse(parse, 1, **wrong).startswith(
        "LLaMA-Factory refuses the recipe: Please enable `predict_with_generat"
    )
    with pytest.raises(ValueError, match="predict_with_generate"):
        get_train_args({"model_name_or_path": "any", "output_dir": "any", "template": "qwen2_vl", **wrong})

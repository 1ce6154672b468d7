"""A model is asked in the words that it was trained in: the record of the system prompt and all who read it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chatreid_plugin.checkpoints import PROMPT_RECORD, read_system_prompt, write_system_prompt
from chatreid_plugin.datasets.benchmark import make_image_query
from chatreid_plugin.errors import DataError
from chatreid_plugin.eval.backends.transformers import TransformersScorer
from chatreid_plugin.eval.questions import IMAGE_PAIR, build_pair_prompt
from chatreid_plugin.records import Answer, ImageReference, Instruction
from chatreid_plugin.tasks import format_chat_prompt
from chatreid_plugin.training.recipe_checks import check_system_prompt
from chatreid_plugin.training.recipe_data import find_token_counter
from chatreid_plugin.training.trainer import PromptRecord
from tests.support import make_eval_settings


CAPTIONING = "chatreid_stage1_image_captioning"
WORDS = "You compare {people}. <image> Answer briefly."
FAMILIES = {"chatreid": "qwen2_vl", "chatreid_qwen2_5_vl": "qwen2_5_vl", "chatreid_qwen3_vl": "qwen3_vl"}
PNG = "000.png"


def make_arguments(template: str, system: str | None) -> Any:
    from llamafactory.hparams.parser import DataArguments

    return DataArguments(template=template, default_system=system)


def fetch(tokenizer: Any, data_args: Any) -> Any:
    from llamafactory.data import get_template_and_fix_tokenizer

    return get_template_and_fix_tokenizer(tokenizer, data_args)


@pytest.fixture
def trained(workshop: Any, tmp_path: Path) -> Path:
    """Return a checkpoint with a record."""
    folder = Path(shutil.copytree(workshop.model, tmp_path / "trained"))
    write_system_prompt(folder, WORDS)
    return folder


@pytest.mark.parametrize("system", [None, "", WORDS])
@pytest.mark.parametrize("template", FAMILIES)
def test_evaluation_writes_the_prompt_of_every_template(
    tokenizer_module: dict[str, Any], template: str, system: str | None
) -> None:
    tokenizer = tokenizer_module["tokenizer"]
    messages = [{"role": "user", "content": "Same?"}, {"role": "assistant", "content": "Yes"}]
    fetch(tokenizer, make_arguments(template, "of an earlier run"))
    ids, _ = fetch(tokenizer, make_arguments(template, system)).encode_oneturn(tokenizer, messages)
    text = format_chat_prompt("Same?", FAMILIES[template], system)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert text.startswith("<|im_start|>system") == bool(
        system or (system is None and template != "chatreid_qwen3_vl")
    )


def test_evaluator_asks_with_the_token_ids_of_training(
    load_rows: Callable[..., Any], write_dataset: Callable[..., Path], write_noise: Any, trained: Path, tmp_path: Path
) -> None:
    root, pair = write_noise([(64, 128), (90, 200)])
    images = tuple(ImageReference(record.path, record.width, record.height) for record in pair)
    record = Instruction("r1", IMAGE_PAIR, images, 2, Answer(match=True), dataset="made")
    write_dataset(tmp_path / "info", [record], root)
    row = load_rows(3, dataset="made", dataset_dir=str(tmp_path / "info"), default_system=WORDS)[0]
    values = {"protocol": "folder", "manifest": "m", "output_dir": "o", "device": "cpu"}

    def ask(**changes: Any) -> tuple[list[int], Any]:
        settings = values | {"model_name_or_path": str(trained)} | changes
        scorer = TransformersScorer(make_eval_settings(settings).model, root)
        scorer.features.encode(pair)
        grids = [scorer.features[one.image_id].grid for one in pair]
        tokens = scorer._tokenizer.encode(build_pair_prompt(make_image_query(pair[0]), IMAGE_PAIR), grids)
        return tokens.ids.tolist(), scorer.fingerprint

    asked, fingerprint = ask()
    assert asked == row["input_ids"][: len(asked)]
    assert row["labels"][: len(asked)] == [-100] * len(asked) and row["labels"][len(asked)] != -100
    assert fingerprint["system_prompt"] == WORDS
    named, other = ask(system_prompt="Other words.")
    assert named != asked and other["system_prompt"] == "Other words."
    (trained / PROMPT_RECORD).unlink()
    assert ask()[1]["system_prompt"] == "You are a helpful assistant."


def test_record_is_written_with_checkpoints_and_the_final_model(parse: Callable[..., Any], tmp_path: Path) -> None:
    callback, state = PromptRecord(), SimpleNamespace(global_step=4)
    output = tmp_path / "out"
    arguments = parse(3, default_system=WORDS).training
    callback.on_save(arguments, state, None)
    assert {path.name for path in output.iterdir()} == {"checkpoint-4"}
    assert read_system_prompt(output / "checkpoint-4") == WORDS
    callback.on_train_end(parse(3).training, state, None)
    assert read_system_prompt(output) == "You are a helpful assistant."
    callback.on_train_end(parse(3, default_system="").training, state, None)
    assert read_system_prompt(output) == ""
    shutil.rmtree(output)
    stock = {"chatreid_stage": None, "chatreid_lazy": False, "template": "qwen2_vl", "dataset": "any"}
    callback.on_train_end(parse(3, **stock).training, state, None)
    assert not output.exists()


def test_inference_and_prediction_take_the_recorded_prompt(
    parse: Callable[..., Any], trained: Path, workshop: Any, tmp_path: Path
) -> None:
    from llamafactory.hparams import get_infer_args

    def find(model: Path, **changes: str) -> Any:
        return get_infer_args({"model_name_or_path": str(model), "template": "chatreid"} | changes)[1].default_system

    assert find(trained) == WORDS and find(workshop.model) is None
    assert find(trained, default_system="Mine.") == "Mine." and find(trained, template="qwen2_vl") is None
    adapter = tmp_path / "adapter"
    write_system_prompt(adapter, "The adapter's.")
    assert find(trained, adapter_name_or_path=str(adapter)) == "The adapter's."
    predicting = {"do_train": False, "do_eval": True, "eval_dataset": CAPTIONING, "model_name_or_path": str(trained)}
    assert parse(3, **predicting).data.default_system == WORDS
    assert parse(3, model_name_or_path=str(trained)).data.default_system is None  # training says what it wants


def test_doctor_names_a_difference(read_recipe: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"

    def find(compared: dict[str, Any] | None, **changes: Any) -> list[tuple[str, str]]:
        file.write_text(json.dumps(compared))
        recipe = read_recipe(3, **changes)
        recipe.data.default_system = changes.get("default_system")  # braces are OmegaConf's
        found = check_system_prompt(recipe, None if compared is None else file)
        return [(finding.state, finding.render()) for finding in found]

    ((state, _),) = find(None)
    assert state == "ok"
    ((state, line),) = find(None, model_name_or_path=str(trained))
    assert state == "warning" and f"was trained with {WORDS!r}" in line
    ((state, line),) = find({"protocol": "folder", "system_prompt": "Mine."})
    assert (
        state == "error" and "'You are a helpful assistant.' here, 'Mine.' in" in line and "Set system_prompt" in line
    )
    ((state, line),) = find({"template": "chatreid", "default_system": "Mine."})
    assert state == "error" and "Set default_system there" in line
    assert find({"model_name_or_path": str(trained)})[0][0] == "error"
    for compared in ({}, {"model_name_or_path": "not/trained/yet"}, {"system_prompt": "Mine."}):
        assert find(compared, default_system="Mine.")[0][0] == "ok"
    (trained / PROMPT_RECORD).unlink()  # trained by an older version: evaluated with the family's own
    assert find({"model_name_or_path": str(trained)}, default_system="Mine.")[0][0] == "error"


def test_longer_prompts_count(read_recipe: Callable[..., Any]) -> None:
    sample = SimpleNamespace(own_prompts=(), image_root="")
    images = tuple(ImageReference(PNG, 56, 112) for _ in range(2))
    record = Instruction("r", IMAGE_PAIR, images, 2, Answer(match=True))
    recipe = read_recipe(3)
    short = find_token_counter(recipe)(sample, record)  # type: ignore[arg-type]
    recipe.data.default_system = "A longer system prompt than the usual one. " * 3
    assert find_token_counter(recipe)(sample, record) > short  # type: ignore[arg-type]


def test_damaged_record_is_one_error(tmp_path: Path) -> None:
    (tmp_path / PROMPT_RECORD).write_text("[]")
    with pytest.raises(DataError, match=f"{PROMPT_RECORD} holds no system_prompt. Remove it and set system_prompt"):
        read_system_prompt(tmp_path)

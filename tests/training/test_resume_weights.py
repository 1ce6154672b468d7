"""All weights of a checkpoint reach the model, in every trainer of LLaMA-Factory, or the run is refused."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.shards import write_json
from chatreid_plugin.training.checkpoint import find_model_name
from chatreid_plugin.training.resume import fits_by_name, load_weights


TRAINERS = {
    "pt": "CustomTrainer",
    "sft": "CustomSeq2SeqTrainer",
    "rm": "PairwiseTrainer",
    "ppo": "CustomPPOTrainer",
    "dpo": "CustomDPOTrainer",
    "kto": "CustomKTOTrainer",
}


def load(folder: Path) -> Any:
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def assert_weights_are(model: Any, wanted: Any) -> None:
    names = wanted.state_dict()
    different = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, names[name])]
    assert not different


@pytest.mark.parametrize("vision", ["visual.", "model.visual."])
@pytest.mark.parametrize("language", ["model.", "model.language_model."])
def test_weights_of_every_layout_reach_the_model(workshop: Any, tmp_path: Path, vision: str, language: str) -> None:
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(workshop.other_model / "model.safetensors").items():
        if "visual." in name:
            stored[vision + name.partition("visual.")[2]] = tensor
        else:
            stored[language + name.removeprefix("model.").removeprefix("language_model.")] = tensor
    save_file(stored, tmp_path / "model.safetensors")
    model = load(workshop.model)
    load_weights(model, tmp_path)
    assert_weights_are(model, load(workshop.other_model))


def test_missing_and_foreign_tensors_are_refused(workshop: Any, tmp_path: Path) -> None:
    tensors = load_file(workshop.model / "model.safetensors")
    first = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks 1 of the model's parameters"):
        load_weights(load(workshop.model), tmp_path)
    save_file(tensors | {"model.other.weight": tensors[first].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.other\.weight with shape .* is no tensor of the model"):
        load_weights(load(workshop.model), tmp_path)
    buffer = {"model.rotary_emb.inv_freq": torch.zeros(2)}  # as early versions of transformers saved it
    save_file(tensors | buffer, tmp_path / "model.safetensors")
    load_weights(load(workshop.model), tmp_path)


def test_names_that_the_model_has_are_kept() -> None:
    assert find_model_name("visual.a", {"visual.a", "model.visual.a"}) == "visual.a"
    assert (
        find_model_name("model.layers.0.a", {"model.language_model.layers.0.a"}) == "model.language_model.layers.0.a"
    )
    assert find_model_name("lm_head.weight", {"lm_head.weight"}) == "lm_head.weight"
    assert find_model_name("model.b", {"model.a"}) is None


@pytest.mark.parametrize("stage", TRAINERS)
def test_every_trainer_asks_for_whole_weights_first(stage: str) -> None:
    """No trainer of LLaMA-Factory has loading of its own, and the one they share is ours."""
    trainer = getattr(importlib.import_module(f"llamafactory.train.{stage}.trainer"), TRAINERS[stage])
    for name in ("_load_from_checkpoint", "_load_best_model"):
        assert getattr(trainer, name).__module__ == "transformers.trainer"  # functools.wraps keeps the name
        assert getattr(trainer, name).__code__.co_filename.endswith("training/resume.py")


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[[Any], Any]:
    """Return a function that gives a model to the Trainer that all of LLaMA-Factory's derive from."""
    import llamafactory.train.callbacks  # noqa: F401 - the hook
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
    return lambda model: Trainer(model=model, args=arguments)


@pytest.mark.parametrize("shard", ["50GB", "60KB"])
def test_trainer_loads_decoder_and_encoder(
    workshop: Any, tmp_path: Path, make_trainer: Callable[[Any], Any], shard: str
) -> None:
    """As transformers 5 writes them, whose own loading leaves the decoder out."""
    wanted = load(workshop.other_model)
    wanted.save_pretrained(tmp_path / "checkpoint-2", max_shard_size=shard)
    trainer = make_trainer(load(workshop.model))
    assert not fits_by_name(trainer.model, tmp_path / "checkpoint-2")
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert_weights_are(trainer.model, wanted)
    best = make_trainer(load(workshop.model))
    best.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    best._load_best_model()
    assert_weights_are(best.model, wanted)


def test_checkpoint_with_the_models_own_names_is_left_to_transformers(
    workshop: Any, tmp_path: Path, make_trainer: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatreid_plugin.training import resume

    wanted = load(workshop.other_model)
    save_file({name: tensor.clone() for name, tensor in wanted.named_parameters()}, tmp_path / "model.safetensors")
    monkeypatch.setattr(resume, "load_weights", None)
    trainer = make_trainer(load(workshop.model))
    trainer._load_from_checkpoint(str(tmp_path))
    assert_weights_are(trainer.model, wanted)


def test_checkpoint_of_another_kind_of_run_is_refused(
    workshop: Any, tmp_path: Path, make_trainer: Callable[[Any], Any]
) -> None:
    """transformers loads nothing of a whole model into an adapter's, and says so in a warning."""
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(load(workshop.model), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"holds a whole model.*trains an adapter.*model_name_or_path: "):
        make_trainer(adapted)._load_from_checkpoint(str(workshop.other_model))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"holds an adapter.*adapter_name_or_path: "):
        make_trainer(load(workshop.model))._load_from_checkpoint(str(tmp_path))
    make_trainer(adapted)._load_from_checkpoint(str(tmp_path))


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_files_of_fsdp_and_deepspeed_are_theirs(workshop: Any, tmp_path: Path, kind: str) -> None:
    from chatreid_plugin.training.resume import _loads_whole

    write_json(tmp_path / "adapter_config.json", {})
    trainer = SimpleNamespace(**({"is_fsdp_enabled": False, "is_deepspeed_enabled": False} | {kind: True}))
    assert not _loads_whole(trainer, torch.nn.Linear(1, 1), tmp_path)

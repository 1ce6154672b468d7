"""Which checkpoint a run goes on from, and its weights in the model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.shards import write_json
from chatreid_plugin.training.adapters import check_adapter_base
from chatreid_plugin.training.checkpoint import MARKER, compose_checkpoint
from chatreid_plugin.training.resume import choose_checkpoint, find_model_name, load_weights


def load(folder: Path) -> Any:
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


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
    wanted = load(workshop.other_model).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_missing_and_foreign_tensors_are_refused(workshop: Any, tmp_path: Path) -> None:
    tensors = load_file(workshop.model / "model.safetensors")
    first = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks 1 of the model's parameters"):
        load_weights(load(workshop.model), tmp_path)
    save_file(tensors | {"model.other.weight": tensors[first].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.other\.weight with shape .* is no tensor of the model"):
        load_weights(load(workshop.model), tmp_path)


def test_names_that_the_model_has_are_kept() -> None:
    assert find_model_name("visual.a", {"visual.a", "model.visual.a"}) == "visual.a"
    assert (
        find_model_name("model.layers.0.a", {"model.language_model.layers.0.a"}) == "model.language_model.layers.0.a"
    )
    assert find_model_name("lm_head.weight", {"lm_head.weight"}) == "lm_head.weight"
    assert find_model_name("model.b", {"model.a"}) is None


def test_half_written_checkpoint_is_not_resumed_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
    last, whole = str(tmp_path / "checkpoint-15"), str(tmp_path / "checkpoint-10")
    assert choose_checkpoint(last, tmp_path, named=False) is None
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert choose_checkpoint(last, tmp_path, named=False) == whole
    assert f"{last} is half-written; resuming from {whole}" in capsys.readouterr().err
    assert choose_checkpoint(True, tmp_path, named=True) == whole
    assert choose_checkpoint(None, tmp_path, named=False) is None
    assert choose_checkpoint(whole, tmp_path, named=True) == whole
    with pytest.raises(
        ConfigError, match=r"checkpoint-15 is half-written.*Set resume_from_checkpoint: .*checkpoint-10"
    ):
        choose_checkpoint(last, tmp_path, named=True)
    with pytest.raises(ConfigError, match="is no folder"):
        choose_checkpoint(str(tmp_path / "none"), tmp_path, named=True)


def test_adapter_of_a_composed_checkpoint_is_refused_on_another_model(workshop: Any, tmp_path: Path) -> None:
    base = compose_checkpoint(workshop.other_model, workshop.model, tmp_path / "run" / "chatreid_initial")
    write_json(tmp_path / "run" / "adapter_config.json", {"base_model_name_or_path": str(base)})

    def check(model: Path) -> None:
        adapters = [str(tmp_path / "run")]
        check_adapter_base(SimpleNamespace(adapter_name_or_path=adapters, model_name_or_path=str(model)))

    check(base)
    with pytest.raises(ConfigError, match=f"Set model_name_or_path: {base}"):
        check(workshop.model)
    check(base.rename(tmp_path / "moved"))
    write_json(base / MARKER, {"fingerprint": "of another swap"})
    with pytest.raises(ConfigError, match="was trained on"):
        check(tmp_path / "moved")

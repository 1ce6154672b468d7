"""The batched vision attention and the patches' projection give what stock transformers gives, with fewer calls."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from chatreid_plugin import vision_tower
from chatreid_plugin.errors import UpstreamError
from chatreid_plugin.vision_tower import (
    BATCHED_NAMES,
    PatchProjection,
    attend_by_size,
    batch_vision_attention,
    project_patches,
)


TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]},
    "qwen3_vl": {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
    },
}
CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
# Frames, rows and columns of patches.
EQUAL = [[1, 8, 4]] * 5
MIXED = [[1, 8, 4], [1, 4, 4], [1, 8, 4], [1, 4, 8], [1, 12, 6], [1, 4, 4]]  # 8x4 and 4x8: as many patches
VIDEO = [[3, 4, 4]]


def make_model(family: str = "qwen2_vl", attention: str = "sdpa", heads: int = 2) -> Any:
    config_class, model_class = CLASSES[family]
    vision = {"depth": 2, "num_heads": heads, "patch_size": 4} | VISION[family]
    torch.manual_seed(0)
    return model_class._from_config(
        config_class(text_config=TEXT, vision_config=vision), attn_implementation=attention
    )


def encode(model: Any, grids: list[list[int]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the tower's output for seeded patches and the gradient of every parameter of the tower."""
    tower = model.model.visual
    grid = torch.tensor(grids)
    size = 3 * 2 * 4 * 4
    dtype = next(tower.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(int(grid.prod(dim=1).sum()), size, generator=generator).to(dtype)
    tower.zero_grad()
    output = tower(patches, grid_thw=grid).pooler_output
    output.float().square().mean().backward()
    gradients = {name: value.grad.clone() for name, value in tower.named_parameters() if value.grad is not None}
    return output.detach(), gradients


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that receives the query's shape at every call of sdpa."""
    shapes: list[tuple[int, ...]] = []
    stock: Callable[..., Any] = AttentionInterface()["sdpa"]

    def attend(module: Any, query: torch.Tensor, *states: torch.Tensor, **options: Any) -> Any:
        shapes.append(tuple(query.shape))
        return stock(module, query, *states, **options)

    mapping: dict[str, Any] = vars(AttentionInterface)["_global_mapping"]
    monkeypatch.setitem(mapping, "sdpa", attend)
    return shapes


@pytest.mark.parametrize("grids", [EQUAL, MIXED, EQUAL[:1], VIDEO, VIDEO + MIXED])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CLASSES)
def test_outputs_and_gradients_are_those_of_stock(family: str, attention: str, grids: list[list[int]]) -> None:
    model = make_model(family, attention)
    output, gradients = encode(model, grids)
    assert batch_vision_attention(model) == 2
    batched_output, batched_gradients = encode(model, grids)
    torch.testing.assert_close(batched_output, output, rtol=1e-5, atol=1e-6)
    assert gradients and gradients.keys() == batched_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(batched_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_images_of_a_size_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = count_calls(monkeypatch)
    model = make_model()
    encode(model, MIXED)
    assert len(shapes) == 2 * len(MIXED)  # what this module is for: one call per image and layer
    shapes.clear()
    batch_vision_attention(model)
    encode(model, MIXED)
    assert shapes == [(2, 2, 16, 16), (3, 2, 32, 16), (1, 2, 72, 16)] * 2
    shapes.clear()
    encode(model, EQUAL)
    assert shapes == [(5, 2, 32, 16)] * 2


def test_bfloat16_is_close_to_stock() -> None:
    model = make_model().to(torch.bfloat16)
    output, gradients = encode(model, MIXED)
    batch_vision_attention(model)
    batched_output, batched_gradients = encode(model, MIXED)
    assert batched_output.dtype == torch.bfloat16
    torch.testing.assert_close(batched_output, output, rtol=2e-2, atol=2e-2)
    for name, gradient in gradients.items():
        torch.testing.assert_close(batched_gradients[name], gradient, rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = make_model()
    batch_vision_attention(model)
    output, gradients = encode(model, MIXED)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    again, checkpointed = encode(model, MIXED)
    assert torch.equal(again, output)
    # Re-entrant checkpointing gives no gradient to what lies before its first input that needs one.
    assert "blocks.0.attn.qkv.weight" in checkpointed
    assert all(torch.equal(gradients[name], gradient) for name, gradient in checkpointed.items())


def test_images_do_not_see_each_other() -> None:
    model = make_model()
    batch_vision_attention(model)
    together = encode(model, EQUAL)[0]
    alone = encode(model, EQUAL[:1])[0]
    torch.testing.assert_close(together[: len(alone)], alone, rtol=1e-5, atol=1e-6)


def test_flash_attention_and_other_families_are_left_alone() -> None:
    model = make_model()
    model.model.visual.config._attn_implementation = "flash_attention_2"
    assert batch_vision_attention(model) == 0
    assert model.model.visual.config._attn_implementation == "flash_attention_2"
    other = make_model()
    other.config.model_type = "llava"
    assert batch_vision_attention(other) == 0
    assert other.model.visual.config._attn_implementation == "sdpa"
    assert batch_vision_attention(torch.nn.Linear(1, 1)) == 0


def test_batching_twice_changes_nothing_and_the_language_part_is_untouched() -> None:
    model = make_model()
    assert (batch_vision_attention(model), batch_vision_attention(model)) == (2, 0)
    assert model.model.visual.config._attn_implementation == BATCHED_NAMES["sdpa"]
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_saved_configuration_does_not_name_the_implementation(tmp_path: Path) -> None:
    model = make_model()
    batch_vision_attention(model)
    model.save_pretrained(tmp_path)
    assert "chatreid" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert type(model).from_pretrained(tmp_path).model.visual.config._attn_implementation == "sdpa"


def test_drifted_transformers_is_refused_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(
        vision_tower.generic, "is_flash_attention_requested", lambda requested_attention_implementation: False
    )
    with pytest.raises(UpstreamError, match="chatreid_flash_sdpa"):
        batch_vision_attention(model)
    monkeypatch.delattr(vision_tower.generic, "is_flash_attention_requested")
    with pytest.raises(UpstreamError, match=r"transformers .* has no transformers\.utils\.generic\.is_flash"):
        batch_vision_attention(model)
    assert model.model.visual.config._attn_implementation == "sdpa"


def test_attention_without_boundaries_is_refused() -> None:
    states = torch.zeros(1, 2, 8, 4)
    with pytest.raises(UpstreamError, match="cu_seq_lens_q"):
        attend_by_size(torch.nn.Module(), states, states, states, None, stock="sdpa")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_llamafactory_loads_stages_batched_and_other_runs_stock(
    parse: Callable[..., Any], tokenizer_module: dict[str, Any], method: str
) -> None:
    from llamafactory.model import load_model

    def find_implementations(**changes: Any) -> tuple[set[str], bool]:
        parsed = parse(1, finetuning_type=method, lora_target="all", additional_target="merger", **changes)
        model = load_model(tokenizer_module["tokenizer"], parsed.model, parsed.finetuning, is_trainable=True)
        layers: list[Any] = [module for module in model.modules() if type(module).__name__ == "VisionAttention"]
        assert len(layers) == 2
        is_projected = any(isinstance(module, PatchProjection) for module in model.modules())
        return {layer.config._attn_implementation for layer in layers}, is_projected

    assert find_implementations() == ({BATCHED_NAMES["sdpa"]}, True)
    assert find_implementations(flash_attn="disabled") == ({BATCHED_NAMES["eager"]}, True)
    assert find_implementations(chatreid_stage=None) == ({"sdpa"}, False)


def test_llamafactory_run_goes_on_when_transformers_drifts(
    parse: Callable[..., Any], tokenizer_module: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamafactory.model import load_model

    monkeypatch.delattr(vision_tower.generic, "is_flash_attention_requested")
    parsed = parse(1)
    model: Any = load_model(tokenizer_module["tokenizer"], parsed.model, parsed.finetuning, is_trainable=True)
    assert model.model.visual.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", CLASSES)
def test_projected_patches_are_those_of_the_convolution(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    names, (output, gradients) = list(model.state_dict()), encode(model, MIXED)
    assert project_patches(model) == 1
    monkeypatch.delattr(torch.nn.Conv3d, "forward")  # nothing convolves any more
    projected_output, projected_gradients = encode(model, MIXED)
    torch.testing.assert_close(projected_output, output, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == projected_gradients.keys()
    assert any("patch_embed" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(projected_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    assert list(model.state_dict()) == names
    assert project_patches(model) == 0  # it is done already


def test_copy_of_a_model_projects_with_its_own_weights() -> None:
    model = make_model()
    project_patches(model)
    other = copy.deepcopy(model)
    other.model.visual.patch_embed.proj.weight.data.zero_()
    patches = torch.ones(2, 3 * 2 * 4 * 4)
    assert not other.model.visual.patch_embed(patches).any()
    assert model.model.visual.patch_embed(patches).all()


def test_larger_inputs_and_other_layers_are_convolved() -> None:
    layer, inputs = torch.nn.Conv3d(3, 4, (2, 4, 4), stride=(2, 4, 4)), torch.randn(2, 3, 4, 8, 8)
    embedding = torch.nn.ModuleDict({"proj": layer})
    model = torch.nn.ModuleDict({"patch_embed": embedding, "other": torch.nn.Conv3d(1, 1, 1)})
    expected = layer(inputs)
    assert project_patches(model) == 1
    assert type(layer) is PatchProjection and type(model["other"]) is torch.nn.Conv3d
    assert torch.equal(layer(inputs), expected)

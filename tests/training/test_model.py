from collections.abc import Callable
from typing import Any

import pytest

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.training.model import Part, check_trainable, find_part, list_trained_parts


PARTS: dict[Part, str] = {
    "vision": "model.visual.blocks.0.attn.qkv.weight",
    "projector": "model.visual.merger.mlp.0.weight",
    "language": "model.language_model.layers.0.mlp.up_proj.weight",
}
ALL = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False, "freeze_language_model": False}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("visual.patch_embed.proj.weight", "vision"),
        ("model.visual.blocks.3.norm1.bias", "vision"),
        ("model.visual.merger.ln_q.weight", "projector"),
        ("base_model.model.model.visual.merger.mlp.0.lora_A.default.weight", "projector"),
        ("base_model.model.model.visual.blocks.0.mlp.fc1.lora_B.default.weight", "vision"),
        ("model.language_model.embed_tokens.weight", "language"),
        ("lm_head.weight", "language"),
    ],
)
def test_part_of_a_parameter(name: str, part: Part) -> None:
    assert find_part(name) == part


@pytest.mark.parametrize("projector", ["encoder", "decoder"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_wrong_part_is_named_with_its_key(stage: int, projector: str) -> None:
    keys = {
        "vision": "freeze_vision_tower",
        "projector": "freeze_multi_modal_projector",
        "language": "freeze_language_model",
    }
    expected = list_trained_parts(stage, projector)
    check_trainable([(name, part in expected) for part, name in PARTS.items()], stage, projector, "full")
    for wrong in PARTS:
        flags = [(name, (part in expected) != (part == wrong)) for part, name in PARTS.items()]
        with pytest.raises(ConfigError) as caught:
            check_trainable(flags, stage, projector, "full")
        text = str(caught.value)
        assert f"set {keys[wrong]}: {'true' if wrong not in expected else 'false'}" in text
        assert all(key not in text for part, key in keys.items() if part != wrong)


def test_one_frozen_tensor_among_trained_ones_is_refused() -> None:
    flags = [(name, True) for name in PARTS.values()] + [("model.visual.blocks.1.norm1.weight", False)]
    with pytest.raises(ConfigError, match=r"1 vision parameter\(s\) are frozen"):
        check_trainable(flags, 2, "encoder", "full")


def test_nothing_trains_is_refused_whatever_the_method() -> None:
    with pytest.raises(ConfigError, match="no parameter trains at all"):
        check_trainable([(name, False) for name in PARTS.values()], 3, "encoder", "lora")


def set_up(parse: Callable[..., Any], tokenizer: Any, stage: int, **changes: Any) -> dict[str, bool]:
    """Return parameter name -> trainable after LLaMA-Factory's own load_model."""
    from llamafactory.model import load_model

    parsed = parse(stage, **changes)
    model = load_model(tokenizer, parsed.model, parsed.finetuning, is_trainable=True)
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.fixture
def tokenizer(tokenizer_module: dict[str, Any]) -> Any:
    return tokenizer_module["tokenizer"]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("key", sorted(ALL))
def test_frozen_part_is_refused_in_stages_1_and_2(
    parse: Callable[..., Any], tokenizer: Any, stage: int, key: str
) -> None:
    with pytest.raises(ConfigError, match=f"must train: set {key}: false"):
        set_up(parse, tokenizer, stage, **(ALL | {key: True}))


def test_defaults_of_llamafactory_are_refused_in_stage_1(parse: Callable[..., Any], tokenizer: Any) -> None:
    from llamafactory.hparams import FinetuningArguments

    names = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
    defaults = {name: getattr(FinetuningArguments(), name) for name in names}
    assert defaults["freeze_vision_tower"]
    with pytest.raises(
        ConfigError, match=r"set freeze_vision_tower: false; .* set freeze_multi_modal_projector: false"
    ):
        set_up(parse, tokenizer, 1, **defaults)


@pytest.mark.parametrize("key", ["freeze_vision_tower", "freeze_multi_modal_projector"])
def test_training_encoder_is_refused_in_stage_3(parse: Callable[..., Any], tokenizer: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=f"must be frozen: set {key}: true"):
        set_up(parse, tokenizer, 3, **{key: False})


def test_recipes_train_what_the_paper_says(parse: Callable[..., Any], tokenizer: Any) -> None:
    for stage in (1, 2):
        assert all(set_up(parse, tokenizer, stage).values())
    stage3 = set_up(parse, tokenizer, 3)
    assert {name for name, trains in stage3.items() if not trains} == {n for n in stage3 if "visual." in n}
    assert any(stage3.values())


def test_merger_trains_in_stage_3_when_it_is_the_decoders(parse: Callable[..., Any], tokenizer: Any) -> None:
    flags = set_up(parse, tokenizer, 3, chatreid_projector="decoder", freeze_multi_modal_projector=False)
    assert {find_part(name) for name, trains in flags.items() if trains} == {"language", "projector"}
    with pytest.raises(ConfigError, match="must train: set freeze_multi_modal_projector: false"):
        set_up(parse, tokenizer, 3, chatreid_projector="decoder")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lora_on_the_decoder_is_accepted(parse: Callable[..., Any], tokenizer: Any, stage: int) -> None:
    keys = {"freeze_vision_tower": True, "freeze_multi_modal_projector": True}
    flags = set_up(parse, tokenizer, stage, finetuning_type="lora", lora_target="all", **keys)
    trained = [name for name, trains in flags.items() if trains]
    assert trained
    assert all("lora_" in name and "visual." not in name for name in trained)


def test_lora_on_the_encoder_is_refused_in_stage_3_only(parse: Callable[..., Any], tokenizer: Any) -> None:
    keys = {"finetuning_type": "lora", "lora_target": "all", "freeze_vision_tower": False}
    keys |= {"freeze_multi_modal_projector": True}
    assert any("visual." in name and trains for name, trains in set_up(parse, tokenizer, 1, **keys).items())
    with pytest.raises(ConfigError, match="finetuning_type: lora: .* vision .* set freeze_vision_tower: true"):
        set_up(parse, tokenizer, 3, **keys)


def test_lora_without_the_projector_that_its_flag_frees_is_refused(parse: Callable[..., Any], tokenizer: Any) -> None:
    keys = {"finetuning_type": "lora", "lora_target": "all"}
    with pytest.raises(ConfigError, match="no projector parameter trains: set additional_target: merger"):
        set_up(parse, tokenizer, 2, **keys)
    flags = set_up(parse, tokenizer, 2, **keys, additional_target="merger")
    assert {find_part(name) for name, trains in flags.items() if trains} == {"vision", "projector", "language"}


@pytest.mark.parametrize("kind", ["lora", "freeze"])
def test_partial_tuning_may_leave_the_encoder_but_not_the_decoder(kind: str) -> None:
    flags = [(PARTS["vision"], False), (PARTS["projector"], False), (PARTS["language"], True)]
    check_trainable(flags, 2, "encoder", kind, ["vision", "projector"])
    with pytest.raises(ConfigError, match="no vision parameter trains"):
        check_trainable(flags, 2, "encoder", kind, ["projector"])
    swapped = [(name, not trains) for name, trains in flags]
    with pytest.raises(ConfigError, match="no language parameter trains: set freeze_language_model: false"):
        check_trainable(swapped, 2, "encoder", kind, ["language"])


def test_adapter_that_reaches_the_frozen_encoder_has_to_be_merged() -> None:
    with pytest.raises(ConfigError, match="1 vision .* merge the adapter first"):
        check_trainable([(name, True) for name in PARTS.values()], 3, "encoder", "lora", ["vision", "projector"])


def test_check_is_left_out_without_a_stage_and_at_inference(parse: Callable[..., Any], tokenizer: Any) -> None:
    from llamafactory.model import load_model

    assert not all(set_up(parse, tokenizer, 1, chatreid_stage=None, freeze_vision_tower=True).values())
    parsed = parse(3, freeze_vision_tower=False)
    model = load_model(tokenizer, parsed.model, parsed.finetuning, is_trainable=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.errors import ConfigError, UpstreamError
from chatreid_plugin.training import hooks


KEYS = ("chatreid_stage", "chatreid_encoder", "chatreid_projector", "chatreid_aspect", "chatreid_lazy")


def test_parsed_recipe_carries_the_keys_to_the_model_loader(parse: Callable[..., Any], workshop: Any) -> None:
    parsed = parse(3, chatreid_projector="decoder", chatreid_aspect="keep")
    assert (parsed.data.chatreid_stage, parsed.data.chatreid_aspect, parsed.data.chatreid_lazy) == (3, "keep", True)
    assert (parsed.finetuning.chatreid_stage, parsed.finetuning.chatreid_projector) == (3, "decoder")
    assert parsed.model.model_name_or_path == str(workshop.model)


def test_help_lists_the_keys_with_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    from llamafactory.hparams import get_train_args

    with pytest.raises(SystemExit) as caught:
        get_train_args(["-h"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{key}" in text for key in KEYS)
    assert "Decoder swap" in text


def test_flags_are_parsed_like_keys(workshop: Any, tmp_path: Path) -> None:
    from llamafactory.hparams import get_train_args

    _, data, *_ = get_train_args(
        f"--model_name_or_path {workshop.model} --output_dir {tmp_path} --template chatreid --dataset any "
        "--dataset_dir ONLINE --chatreid_stage 3 --chatreid_lazy true --chatreid_aspect keep --do_train".split()
    )
    assert (data.chatreid_stage, data.chatreid_lazy, data.chatreid_aspect) == (3, True, "keep")


def test_unknown_key_is_refused(parse: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="chatreid_stge"):
        parse(1, chatreid_stge=1)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (1, {"chatreid_stage": 4}, "chatreid_stage must be 1, 2 or 3, not 4"),
        (1, {"chatreid_stage": "two"}, "chatreid_stage must be 1, 2 or 3, not 'two'"),
        (1, {"chatreid_aspect": "crop"}, "chatreid_aspect must be stretch or keep"),
        (2, {"chatreid_projector": "both"}, "chatreid_projector must be encoder or decoder"),
        (1, {"template": "qwen2_vl"}, "chatreid_stage: 1 needs `template: chatreid`, found template 'qwen2_vl'"),
        (1, {"template": None}, "needs `template: chatreid`"),
        (1, {"chatreid_encoder": "x"}, "chatreid_encoder is set with chatreid_stage: 1"),
        (3, {"chatreid_encoder": "x"}, "chatreid_encoder is set with chatreid_stage: 3"),
        (2, {"chatreid_encoder": "/not/there"}, "chatreid_encoder: /not/there is not a folder"),
        (2, {"model_name_or_path": "./not_there"}, "model_name_or_path: ./not_there is not a folder"),
    ],
)
def test_wrong_value_is_one_clear_error_and_nothing_is_written(
    parse: Callable[..., Any], tmp_path: Path, stage: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(stage, **changes)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_encoder_of_another_architecture_is_refused_before_anything_is_written(
    parse: Callable[..., Any], workshop: Any, tmp_path: Path
) -> None:
    encoder = shutil.copytree(workshop.other_model, tmp_path / "encoder")
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    with pytest.raises(ConfigError, match=f"The encoder {encoder} is a llava, .* cannot swap"):
        parse(2, chatreid_encoder=str(encoder))
    (encoder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no safetensors weights"):
        parse(2, chatreid_encoder=str(encoder))
    assert not (tmp_path / "out").exists()


def test_arguments_are_unpickled_from_where_llamafactory_has_them(parse: Callable[..., Any]) -> None:
    """So that a spawned worker loads LLaMA-Factory, and with it the plugin, in the usual order."""
    data = parse(1).data
    written = pickle.dumps(data)
    assert b"llamafactory.hparams.parser" in written and b"chatreid_plugin.training.arguments" not in written
    assert pickle.loads(written) == data


def test_swap_without_a_stage_is_allowed(parse: Callable[..., Any], tmp_path: Path) -> None:
    parsed = parse(2, chatreid_stage=None)
    assert parsed.model.model_name_or_path == str(tmp_path / "out" / "chatreid_initial")


def test_swap_is_left_out_when_nothing_is_trained(parse: Callable[..., Any], workshop: Any, tmp_path: Path) -> None:
    parsed = parse(2, do_train=False)
    assert parsed.model.model_name_or_path == str(workshop.model)
    assert not (tmp_path / "out" / "chatreid_initial").exists()


def test_inference_takes_the_stage_too(workshop: Any) -> None:
    from llamafactory.hparams import get_infer_args

    values = {"model_name_or_path": str(workshop.model), "template": "chatreid", "chatreid_stage": 2}
    _, data, finetuning, _ = get_infer_args(values)
    assert (data.chatreid_stage, finetuning.chatreid_stage) == (2, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chatreid_stage": None, "chatreid_lazy": False},
        {"chatreid_stage": None, "template": "qwen2_vl"},
    ],
)
def test_run_that_uses_the_plugin_stops_when_a_hook_has_failed(
    parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    target = "llamafactory.model.loader"
    failed = hooks.HookStatus("check of the trainable parameters", target, "failed", "UpstreamError: drifted")
    monkeypatch.setitem(hooks.STATUS, target, failed)
    with pytest.raises(
        UpstreamError, match="check of the trainable parameters is not at work: UpstreamError: drifted"
    ):
        parse(1, **changes)


def test_stock_run_goes_on_when_a_hook_has_failed(parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hooks.STATUS, "llamafactory.model.loader", hooks.HookStatus("a", "b", "failed", "c"))
    parsed = parse(1, chatreid_stage=None, chatreid_lazy=False, template="qwen2_vl", dataset="any")
    assert parsed.data.template == "qwen2_vl"

"""Which checkpoint a run goes on from."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.shards import write_json
from chatreid_plugin.training.checkpoint import MARKER, check_adapter_base, compose_checkpoint
from chatreid_plugin.training.resume import Run, choose_checkpoint, find_named_checkpoint


def make_checkpoint(folder: Path, *names: str) -> str:
    """Write a checkpoint that is whole, with what a run of the usual kind leaves unless other names are given."""
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", *(names or ("optimizer.pt", "scheduler.pt"))):
        (folder / name).touch()
    return str(folder)


def test_half_written_checkpoint_is_not_resumed_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint-15").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    last = str(tmp_path / "checkpoint-15")
    found, named = Run(tmp_path, named=False), Run(tmp_path, named=True)
    assert choose_checkpoint(last, found) is None
    make_checkpoint(tmp_path / "checkpoint-5")
    whole = make_checkpoint(tmp_path / "checkpoint-10")
    assert choose_checkpoint(last, found) == whole
    assert f"{last} is half-written; resuming from {whole}" in capsys.readouterr().err
    assert choose_checkpoint(True, named) == whole
    assert choose_checkpoint(None, found) is None
    assert choose_checkpoint(whole, named) == whole
    with pytest.raises(
        ConfigError, match=r"checkpoint-15 is half-written.*Set resume_from_checkpoint: .*checkpoint-10"
    ):
        choose_checkpoint(last, named)
    with pytest.raises(ConfigError, match="is not a folder"):
        choose_checkpoint(str(tmp_path / "none"), named)


WEIGHTS_ALONE = "model_name_or_path: {checkpoint} with another output_dir"
ANEW = ", or set overwrite_output_dir: true to begin"


@pytest.mark.parametrize(
    ("names", "run", "remedy"),
    [
        (("model.safetensors",), {"named": True}, WEIGHTS_ALONE + " and no resume_from_checkpoint."),
        (("model.safetensors",), {"named": False}, WEIGHTS_ALONE + ANEW),
        (("model.safetensors", "optimizer.pt"), {"named": False}, WEIGHTS_ALONE + ANEW),
        (("model.safetensors",), {"named": False, "swaps": True}, WEIGHTS_ALONE + " and no chatreid_encoder"),
        (("adapter_config.json",), {"named": False}, "set adapter_name_or_path: {checkpoint} with"),
        # Of a run without DeepSpeed into one with it, and the other way round.
        (("model.safetensors", "optimizer.pt", "scheduler.pt"), {"named": False, "deepspeed": True}, WEIGHTS_ALONE),
        (("model.safetensors", "global_step2", "scheduler.pt"), {"named": False}, WEIGHTS_ALONE),
        ((), {"named": True, "stage": "rm"}, WEIGHTS_ALONE + " and no resume_from_checkpoint."),
        (("adapter_config.json",), {"named": False, "stage": "ppo"}, "set adapter_name_or_path: {checkpoint} with"),
    ],
)
def test_checkpoint_that_no_run_can_go_on_from_is_refused_with_the_way_out(
    tmp_path: Path, names: tuple[str, ...], run: dict[str, Any], remedy: str
) -> None:
    """A run that goes on without its optimizer warms up again; transformers does so without a word."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint-2", *names)
    for resume in (checkpoint, True):
        with pytest.raises(ConfigError) as caught:
            choose_checkpoint(resume, Run(tmp_path, **run))
        assert remedy.format(checkpoint=checkpoint) in str(caught.value)


def test_every_kind_of_optimizer_is_known(tmp_path: Path) -> None:
    deepspeed = make_checkpoint(tmp_path / "checkpoint-1", "global_step1", "latest")
    fsdp = make_checkpoint(tmp_path / "checkpoint-2", "optimizer_0", "scheduler.pt")
    assert choose_checkpoint(deepspeed, Run(tmp_path, named=False, deepspeed=True)) == deepspeed
    assert choose_checkpoint(fsdp, Run(tmp_path, named=False)) == fsdp


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (None, None),
        ({}, None),
        ({"resume_from_checkpoint": "a"}, "a"),
        (["--resume_from_checkpoint", "a", "--do_train"], "a"),
        (["--do_train", "--resume_from_checkpoint=a"], "a"),
        (["--do_train"], None),
    ],
)
def test_named_checkpoint_is_read_from_both_kinds_of_arguments(args: Any, named: str | None) -> None:
    assert find_named_checkpoint(args) == named


def test_checkpoint_that_llamafactory_forgets_is_refused(parse: Callable[..., Any], tmp_path: Path) -> None:
    """Full tuning of a reward model: it warns, and trains from the start."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint-2")
    stock = {"template": "qwen2_vl", "chatreid_stage": None, "chatreid_lazy": False, "dataset": "any"}
    with pytest.raises(ConfigError, match="cannot resume stage: rm from"):
        parse(1, resume_from_checkpoint=checkpoint, stage="rm", **stock)
    assert parse(1).training.resume_from_checkpoint is None


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


def test_adapter_on_a_model_of_another_name_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, export and resuming: PEFT takes any base of the same shapes."""
    from llamafactory.extras import logging

    said: list[str] = []
    monkeypatch.setattr(logging.logging.Logger, "warning_rank0", lambda self, text: said.append(text))
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "saves/a/stage2"})
    for adapters, resumed in (([str(tmp_path)], None), (None, str(tmp_path))):
        for model in ("saves/a/stage2", "saves/b/stage2"):
            arguments = SimpleNamespace(adapter_name_or_path=adapters, model_name_or_path=model)
            check_adapter_base(arguments, resumed)
    assert len(said) == 2
    assert all(f"{tmp_path} was trained on saves/a/stage2, and is put on saves/b/stage2" in text for text in said)

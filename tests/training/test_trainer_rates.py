from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.shards import write_json
from chatreid_plugin.training.model import find_part
from chatreid_plugin.training.trainer import check_vision_rate, parse_rate


RATE, VISION_RATE = 1e-2, 1e-3


@pytest.fixture
def make_trainer(parse: Callable[..., Any], tokenizer_module: dict[str, Any]) -> Callable[..., Any]:
    """Return a function that makes LLaMA-Factory's trainer and its optimizer from a recipe with overrides."""

    def make(stage: int = 1, **changes: Any) -> Any:
        from llamafactory.model import load_model
        from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

        changes = {"optim": "sgd", "weight_decay": 0.0, "learning_rate": RATE} | changes
        parsed = parse(stage, **changes)
        model = load_model(tokenizer_module["tokenizer"], parsed.model, parsed.finetuning, is_trainable=True)
        trainer = CustomSeq2SeqTrainer(
            model=model,
            args=parsed.training,
            finetuning_args=parsed.finetuning,
            processor=None,
            tokenizer=tokenizer_module["tokenizer"],
        )
        trainer.create_optimizer()
        return trainer

    return make


def measure_updates(trainer: Any) -> dict[str, float]:
    """Return part -> how far one step moves its parameters when every gradient is one."""
    named = [(name, value) for name, value in trainer.model.named_parameters() if value.requires_grad]
    before = {name: value.detach().clone() for name, value in named}
    for _, value in named:
        value.grad = torch.ones_like(value)
    trainer.optimizer.step()
    moved: dict[str, list[torch.Tensor]] = {}
    for name, value in named:
        moved.setdefault(find_part(name), []).append((before[name] - value.detach()).flatten())
    updates = {part: torch.cat(values) for part, values in moved.items()}
    for part, values in updates.items():
        torch.testing.assert_close(
            values, torch.full_like(values, float(values.mean())), rtol=1e-3, atol=1e-6, msg=part
        )
    return {part: float(values.mean()) for part, values in updates.items()}


@pytest.mark.parametrize(("projector", "projector_rate"), [("encoder", VISION_RATE), ("decoder", RATE)])
def test_a_step_moves_the_encoder_by_its_own_rate(
    make_trainer: Callable[..., Any], projector: str, projector_rate: float
) -> None:
    trainer = make_trainer(chatreid_vision_learning_rate=VISION_RATE, chatreid_projector=projector)
    expected = {"vision": VISION_RATE, "projector": projector_rate, "language": RATE}
    assert measure_updates(trainer) == pytest.approx(expected, rel=1e-3)


def test_without_the_key_all_parts_move_alike(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer()
    assert measure_updates(trainer) == pytest.approx(
        dict.fromkeys(("vision", "projector", "language"), RATE), rel=1e-3
    )
    assert len(trainer.optimizer.param_groups) == 2


def test_weight_decay_keeps_its_parameters(make_trainer: Callable[..., Any]) -> None:
    def list_decay(trainer: Any) -> dict[str, float]:
        names = {id(value): name for name, value in trainer.model.named_parameters()}
        return {
            names[id(p)]: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]
        }

    stock = make_trainer(optim="adamw_torch", weight_decay=0.1)
    split = make_trainer(optim="adamw_torch", weight_decay=0.1, chatreid_vision_learning_rate=VISION_RATE)
    assert list_decay(split) == list_decay(stock)
    assert set(list_decay(split).values()) == {0.0, 0.1}
    assert [group["lr"] for group in split.optimizer.param_groups] == [RATE, VISION_RATE] * 2


def test_scheduler_scales_both_rates_alike(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(chatreid_vision_learning_rate=VISION_RATE, lr_scheduler_type="cosine", warmup_ratio=0.3)
    trainer.create_scheduler(10, trainer.optimizer)
    seen: list[float] = []
    for _ in range(9):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        rates = {round(group["lr"] / group["initial_lr"], 6) for group in trainer.optimizer.param_groups}
        assert len(rates) == 1
        seen.extend(rates)
    assert max(seen) == 1.0 and seen[0] < 0.5 and seen[-1] < 0.1


def test_lora_on_the_encoder_follows_the_key(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(
        chatreid_vision_learning_rate=VISION_RATE,
        finetuning_type="lora",
        lora_target="all",
        freeze_vision_tower=False,
        freeze_multi_modal_projector=True,
    )
    assert measure_updates(trainer) == pytest.approx({"vision": VISION_RATE, "language": RATE}, rel=1e-3)


def test_making_the_optimizer_again_splits_nothing_twice(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(chatreid_vision_learning_rate=VISION_RATE)
    groups = [len(group["params"]) for group in trainer.optimizer.param_groups]
    trainer.create_optimizer()
    assert [len(group["params"]) for group in trainer.optimizer.param_groups] == groups


def test_a_frozen_encoder_is_refused(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="no parameter of the vision encoder trains"):
        make_trainer(3, chatreid_vision_learning_rate=VISION_RATE)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio"),
        ({"use_adam_mini": True}, "use_adam_mini"),
        ({"stage": "pt"}, "stage 'pt'"),
    ],
)
def test_what_sets_rates_itself_is_refused(changes: dict[str, Any], text: str) -> None:
    from llamafactory.hparams import FinetuningArguments

    finetuning = FinetuningArguments(**({"finetuning_type": "lora"} | changes))
    with pytest.raises(ConfigError, match=text):
        check_vision_rate(VISION_RATE, SimpleNamespace(), finetuning)
    check_vision_rate(None, SimpleNamespace(), finetuning)


def test_keys_are_checked_as_arguments_are_parsed(parse: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="loraplus_lr_ratio"):
        parse(1, chatreid_vision_learning_rate=VISION_RATE, loraplus_lr_ratio=16.0, finetuning_type="lora")


@pytest.mark.parametrize("name", ["optimizer", "scheduler"])
def test_optimizer_or_scheduler_of_a_deepspeed_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    write_json(path, {name: {"type": "x"}})
    training = SimpleNamespace(hf_deepspeed_config=SimpleNamespace(config={name: {}}), deepspeed=str(path))
    finetuning = SimpleNamespace(stage="sft")
    with pytest.raises(ConfigError, match=rf"zero\.json has its own '{name}'"):
        check_vision_rate(VISION_RATE, training, finetuning)
    check_vision_rate(None, training, finetuning)


@pytest.mark.parametrize("value", [0.0, -1e-5, "fast", float("nan"), float("inf")])
def test_wrong_rates_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="must be a positive number"):
        parse_rate(value)


def test_rate_without_a_point_is_a_number(parse: Callable[..., Any]) -> None:
    assert parse(1, chatreid_vision_learning_rate="1e-6").data.chatreid_vision_learning_rate == 1e-6
    assert parse(1).finetuning.chatreid_vision_learning_rate is None

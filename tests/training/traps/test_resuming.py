"""Traps of going on: what stock LLaMA-Factory with transformers 5 resumes from, and what it leaves out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatreid_plugin.errors import ConfigError


def test_trap_28_resuming_loads_the_decoder_too(workshop: Any, tmp_path: Path) -> None:
    """The stock half of this test fails when transformers mends it; then ours can go."""
    import llamafactory.train.callbacks  # noqa: F401 - the hook
    from transformers import Qwen2VLForConditionalGeneration, Trainer, TrainingArguments

    def load(folder: Path) -> Any:
        return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    wanted = load(workshop.other_model)
    wanted.save_pretrained(tmp_path / "checkpoint-2")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer: Any = Trainer(model=load(workshop.model), args=arguments)

    def count_left_out() -> int:
        names = wanted.state_dict()
        return sum(not torch.equal(tensor, names[name]) for name, tensor in trainer.model.state_dict().items())

    stock: Any = Trainer._load_from_checkpoint
    stock.__wrapped__(trainer, str(tmp_path / "checkpoint-2"))
    assert count_left_out() > 10
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert count_left_out() == 0


def test_trap_29_checkpoint_without_optimizer_is_refused(parse: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = tmp_path / "out" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    for name in ("trainer_state.json", "model.safetensors"):
        (checkpoint / name).touch()
    for changes in ({"overwrite_output_dir": False}, {"resume_from_checkpoint": str(checkpoint)}):
        with pytest.raises(ConfigError, match=f"no optimizer.pt.*set model_name_or_path: {checkpoint}"):
            parse(1, **changes)


def test_trap_30_finished_run_trains_no_step_more(tmp_path: Path, make_line: Callable[[], Any]) -> None:
    """The stock half of this test fails when transformers mends it; then ours can go."""
    import llamafactory.train.callbacks  # noqa: F401 - the hook
    from transformers import Trainer, TrainingArguments

    def train(output: str, function: Any, **changes: Any) -> int:
        rows = [{"x": torch.ones(2) * n} for n in range(8)]
        values: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none"}
        arguments = TrainingArguments(output_dir=str(tmp_path / output), use_cpu=True, **(values | changes))
        trainer: Any = Trainer(model=make_line(), args=arguments, train_dataset=rows)  # type: ignore[arg-type]
        function(trainer, resume_from_checkpoint=any((tmp_path / output).glob("checkpoint-*")))
        return trainer.state.global_step

    ours: Any = Trainer.train
    assert [train("stock", ours.__wrapped__) for _ in range(3)] == [2, 3, 4]
    assert [train("ours", ours) for _ in range(3)] == [2, 2, 2]

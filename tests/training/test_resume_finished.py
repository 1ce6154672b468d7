"""A run that is started again at its end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def train(tmp_path: Path, make_line: Callable[[], Any]) -> Callable[..., Any]:
    """Return a function that trains to step 2, from the last checkpoint if there is one, and returns the Trainer."""
    import llamafactory.train.callbacks  # noqa: F401 - the hook
    from transformers import Trainer, TrainingArguments

    rows: Any = [{"x": torch.ones(2) * number} for number in range(8)]

    def run(**changes: Any) -> Any:
        values: dict[str, Any] = {
            "max_steps": 2,
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "label_names": ["x"],
            "lr_scheduler_type": "constant",
            "learning_rate": 0.01,
        }
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", **(values | changes)
        )
        trainer: Any = Trainer(model=make_line(), args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.result = trainer.train(resume_from_checkpoint=any((tmp_path / "run").glob("checkpoint-*")))
        return trainer

    return run


def test_finished_run_keeps_weights_and_figures(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamafactory.extras import logging

    said: list[str] = []
    monkeypatch.setattr(logging.logging.Logger, "warning_rank0", lambda self, text: said.append(text))
    first = train()
    assert not said
    (tmp_path / "run" / "train_results.json").write_text(json.dumps({"train_loss": 0.5, "epoch": 0.5}))
    again = train()
    assert "this run is finished, at step 2 of 2: nothing is trained" in said[0] and len(said) == 1
    assert torch.equal(again.model.line.weight, first.model.line.weight)
    assert again.state.global_step == 2 and not again.is_in_train
    assert again.result.training_loss == 0.5 and again.result.metrics == {"train_loss": 0.5, "epoch": 0.5}
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    more = train(max_steps=3)
    assert more.state.global_step == 3 and len(said) == 1
    assert not torch.equal(more.model.line.weight, first.model.line.weight)


def test_finished_run_ends_with_its_best_model(train: Callable[..., Any]) -> None:
    """Such as one that was killed between the last checkpoint and the writing of the model."""
    values = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    values["greater_is_better"] = True  # so that the first step, of the higher loss, counts as the best
    first = train(**values)
    assert first.state.best_model_checkpoint.endswith("checkpoint-1")
    again = train(**values)
    assert torch.equal(again.model.line.weight, first.model.line.weight)

"""``chatreid_loss`` through ``llamafactory-cli train``: a step of eight records cut in three ways."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


pytestmark = pytest.mark.slow
RunCommand = Callable[..., subprocess.CompletedProcess[str]]


def read_log(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_processes_batch_size_and_accumulation_leave_loss_and_log_as_they_are(
    run_llamafactory: RunCommand, workshop: Any, tmp_path: Path
) -> None:
    logs: list[list[dict[str, float]]] = []
    for processes, batch, steps in ((1, 8, 1), (1, 1, 8), (2, 2, 2)):
        output = tmp_path / f"{processes}x{batch}x{steps}"
        overrides = workshop.list_overrides(
            2,
            output,
            chatreid_loss="records",
            train_sampling_strategy="random",  # batches of like length depend on how many records one has
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            per_device_eval_batch_size=batch,
            eval_dataset="chatreid_stage1_image_captioning,chatreid_stage3_standard_reid",
            eval_strategy="steps",
            eval_steps=2,
            optim="sgd",
            chatreid_stage=None,
            chatreid_encoder=None,
        )
        environment = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"} if processes == 2 else {}
        result = run_llamafactory("train", "examples/stage2.yaml", overrides=overrides, **environment)
        assert result.returncode == 0, result.stderr[-4000:]
        logs.append(read_log(output))
    timed = ("runtime", "per_second", "flos", "epoch", "train_loss", "step")
    for other in logs[1:]:
        assert len(other) == len(logs[0])
        for line, expected in zip(other, logs[0], strict=True):
            wanted = {name: value for name, value in expected.items() if not name.endswith(timed)}
            assert {name: line[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    first, evaluation = logs[0][0], next(line for line in logs[0] if any(name.startswith("eval") for name in line))
    shares = [value for name, value in first.items() if name.startswith("share/")]
    assert len(shares) > 2 and sum(shares) == pytest.approx(1)
    assert any("_loss/" in name for name in evaluation)

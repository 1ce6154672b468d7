"""Two processes under DeepSpeed train as one process does: the same swap, the same losses, whole checkpoints."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.runner import build_datasets


pytestmark = pytest.mark.slow
RunCommand = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 10
# A CPU is no accelerator that DeepSpeed would choose; with `use_cpu: true` it would not learn of the other process.
TWO_PROCESSES = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Run:
    """The losses of each step, the swapped checkpoint that training started from, and the one it wrote."""

    losses: list[float]
    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pairs(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build records whose answers have one length.

    LLaMA-Factory averages over the tokens of each process and then over processes, so only then does the number of
    processes not show in the loss.
    """
    root = tmp_path_factory.mktemp("pairs")
    settings = {
        "sources": [{"name": "market1501", "root": workshop.images, "allow_count_mismatch": True}],
        "manifest_dir": root / "manifests",
        "output_dir": root / "dataset_info",
        "records": {"stage2": 4 * STEPS},
        "stage2_ratios": {"image_to_image_one_to_one": 1.0},
        "prompt_variants": 1,
    }
    build_datasets(BuildSettings.model_validate(settings))
    return root / "dataset_info"


@pytest.fixture(scope="module")
def train(
    run_llamafactory: RunCommand, workshop: Any, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """Return a function that runs Stage 2, four records a step."""

    def run(environment: dict[str, str], **changes: object) -> Run:
        output = tmp_path_factory.mktemp("launched") / "out"
        data = {"dataset_dir": str(pairs), "dataset": "chatreid_stage2_image_to_image_one_to_one"}
        overrides = workshop.list_overrides(2, output, max_steps=STEPS, use_cpu=False, **data, **changes)
        result = run_llamafactory("train", "examples/stage2.yaml", overrides=overrides, **environment)
        assert result.returncode == 0, result.stderr[-4000:]
        lines = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        folders = output / "chatreid_initial", output
        return Run(losses, *(load_file(folder / "model.safetensors") for folder in folders))

    return run


@pytest.fixture(scope="module")
def alone(train: Callable[..., Run]) -> Run:
    """Train in one process."""
    return train({}, per_device_train_batch_size=4)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_one_process(stage: int, train: Callable[..., Run], alone: Run) -> None:
    run = train(TWO_PROCESSES, deepspeed=f"examples/deepspeed/ds_z{stage}_config.json", per_device_train_batch_size=2)
    assert len(run.losses) == len(alone.losses) == STEPS
    assert run.losses == pytest.approx(alone.losses, rel=1e-4)
    assert alone.losses[-1] < alone.losses[0]
    assert all(torch.equal(run.start[name], tensor) for name, tensor in alone.start.items())
    # Every tensor is there and whole; ZeRO-2 writes the tied output layer a second time.
    shapes = {name: tensor.shape for name, tensor in run.end.items() if name in alone.end}
    assert shapes == {name: tensor.shape for name, tensor in alone.end.items()}
    assert set(run.end) - set(alone.end) <= {"lm_head.weight"}

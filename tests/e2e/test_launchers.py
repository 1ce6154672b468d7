"""Two processes under DeepSpeed train as one process does: the same swap, the same losses, whole checkpoints."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.build import build_datasets
from chatreid_plugin.training.checkpoint import MARKER


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("launchers")]
REPOSITORY = Path(__file__).parents[2]
RunCommand = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 10
# A CPU is no accelerator that DeepSpeed would choose; with `use_cpu: true` it would not learn of the other process.
TWO_PROCESSES = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Run:
    """What was printed, the losses of each step, the swapped checkpoint that was trained, and the one written."""

    output: Path
    printed: str
    losses: list[float]
    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pairs(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build records of one task, whose answers have one length."""
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
    """Return a function that runs Stage 2, four records a step.

    LLaMA-Factory cuts the command that it gives to torchrun at spaces, so odd paths stand in the YAML.
    """
    odd = tmp_path_factory.mktemp("launched") / "größe = [1] & 'two'"
    shutil.copytree(workshop.model, odd / "mödel")
    shutil.copytree(workshop.other_model, odd / "encoder #1")
    shipped = yaml.safe_load((REPOSITORY / "examples" / "stage2.yaml").read_text())
    inputs = {"model_name_or_path": str(odd / "mödel"), "chatreid_encoder": str(odd / "encoder #1")}
    inputs |= {"dataset_dir": str(pairs), "dataset": "chatreid_stage2_image_to_image_one_to_one"}

    def run(name: str, environment: dict[str, str], **changes: object) -> Run:
        output, recipe = odd / f"saves {name}", odd.parent / f"{name}.yaml"
        overrides = workshop.list_overrides(2, output, max_steps=STEPS, use_cpu=False, **inputs, **changes)
        recipe.write_text(yaml.safe_dump(shipped | overrides, allow_unicode=True))
        result = run_llamafactory("train", recipe, **environment)
        assert result.returncode == 0, result.stderr[-4000:]
        lines = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        folders = output / "chatreid_initial", output
        return Run(
            output, result.stdout + result.stderr, losses, *(load_file(f / "model.safetensors") for f in folders)
        )

    return run


@pytest.fixture(scope="module")
def alone(train: Callable[..., Run]) -> Run:
    """Train in one process."""
    return train("alone", {}, per_device_train_batch_size=4)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_one_process(stage: int, train: Callable[..., Run], alone: Run) -> None:
    deepspeed = f"examples/deepspeed/ds_z{stage}_config.json"
    run = train(f"zero{stage}", TWO_PROCESSES, deepspeed=deepspeed, per_device_train_batch_size=2)
    assert "world size: 2" in run.printed
    assert run.printed.count("vision tensors from") == 1  # one process composes, the other waits
    assert (run.output / "chatreid_initial" / MARKER).is_file()
    assert not list(run.output.glob(".*.tmp"))
    assert len(run.losses) == len(alone.losses) == STEPS
    assert run.losses == pytest.approx(alone.losses, rel=1e-4)
    assert alone.losses[-1] < alone.losses[0]
    assert all(torch.equal(run.start[name], tensor) for name, tensor in alone.start.items())
    # Every tensor is there and whole; ZeRO-2 writes the tied output layer a second time.
    shapes = {name: tensor.shape for name, tensor in run.end.items() if name in alone.end}
    assert shapes == {name: tensor.shape for name, tensor in alone.end.items()}
    assert set(run.end) - set(alone.end) <= {"lm_head.weight"}

"""``llamafactory-cli train`` on a CPU: lazy and eager, and what a user sees if something is wrong.

The three stages by the shipped recipes' own keys: ``test_full_recipe.py``.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RunCommand = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Run:
    """One finished training."""

    output: Path
    result: subprocess.CompletedProcess[str]

    @property
    def losses(self) -> list[float]:
        lines = [json.loads(line) for line in (self.output / "trainer_log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    def read(self, folder: str = ".") -> dict[str, torch.Tensor]:
        return load_file(self.output / folder / "model.safetensors")


@pytest.fixture(scope="module")
def train(run_llamafactory: RunCommand, workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Return a function that runs a stage's recipe with overrides."""

    def run(stage: int, environment: dict[str, str] | None = None, check: bool = True, **changes: object) -> Run:
        output = tmp_path_factory.mktemp(f"stage{stage}") / "out"
        overrides = workshop.list_overrides(stage, output, **changes)
        result = run_llamafactory("train", f"examples/stage{stage}.yaml", overrides=overrides, **(environment or {}))
        assert not check or result.returncode == 0, result.stderr[-4000:]
        return Run(output, result)

    return run


def count_changed(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> int:
    assert first.keys() == second.keys()
    return sum(not torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_lazy_and_eager_training_give_the_same_losses(train: Callable[..., Run]) -> None:
    order = {"train_sampling_strategy": "random"}  # without tokens, lengths are estimates
    lazy, eager = train(1, **order), train(1, chatreid_lazy=False, **order)
    assert "Running tokenizer on dataset" in eager.result.stderr
    assert "Running tokenizer on dataset" not in lazy.result.stderr
    assert eager.losses == lazy.losses
    assert count_changed(eager.read(), lazy.read()) == 0


def assert_brief(run: Run, kind: str, message: str) -> None:
    """Check that stderr ends with one line for the user, and that no model was written."""
    assert run.result.returncode != 0
    last = run.result.stderr.splitlines()[-1]
    assert last.startswith(f"chatreid: {kind}: "), run.result.stderr[-3000:]
    assert message in last
    assert not list(run.output.rglob("*.safetensors")) if run.output.exists() else True


def test_wrong_stage_is_the_last_line_under_torchrun(train: Callable[..., Run]) -> None:
    run = train(1, {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1"}, check=False, chatreid_stage=4)
    assert "ChildFailedError" in run.result.stderr  # torchrun's own report stands above
    assert_brief(run, "ConfigError", "chatreid_stage must be 1, 2 or 3, not 4")
    assert not run.output.exists()


def test_truncated_image_is_named_from_a_data_loader_worker(
    train: Callable[..., Run], workshop: Any, tmp_path: Path
) -> None:
    media = shutil.copytree(workshop.images, tmp_path / "media")
    for path in media.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run = train(1, check=False, media_dir=str(media), dataloader_num_workers=1)
    assert_brief(run, "DataError", f"Image {media}")
    last = run.result.stderr.splitlines()[-1]
    assert "Traceback" not in run.result.stderr
    assert "(record chatreid_stage1_image_captioning-" in last and "truncated" in last

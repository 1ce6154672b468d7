"""``llamafactory-cli train`` on a CPU: lazy and eager, in two processes, and what a user sees if something is wrong.

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
import yaml
from safetensors.torch import load_file

from chatreid_plugin.training.checkpoint import MARKER, find_vision_suffix


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


def split(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the vision tensors, the merger included, and the others."""
    vision = {name: tensor for name, tensor in tensors.items() if find_vision_suffix(name) is not None}
    return vision, {name: tensor for name, tensor in tensors.items() if name not in vision}


def count_changed(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> int:
    assert first.keys() == second.keys()
    return sum(not torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_lazy_and_eager_training_give_the_same_losses(train: Callable[..., Run]) -> None:
    lazy, eager = train(1), train(1, chatreid_lazy=False)
    assert "Running tokenizer on dataset" in eager.result.stderr
    assert "Running tokenizer on dataset" not in lazy.result.stderr
    assert eager.losses == lazy.losses
    assert count_changed(eager.read(), lazy.read()) == 0


def test_stage_2_with_two_processes_and_odd_paths(run_llamafactory: RunCommand, workshop: Any, tmp_path: Path) -> None:
    """The launcher starts torchrun from PATH; without a GPU the processes talk through gloo.

    LLaMA-Factory cuts the command that it gives to torchrun at spaces, so odd paths stand in the YAML.
    """
    odd = tmp_path / "größe = [1] & 'two'"
    shutil.copytree(workshop.model, odd / "mödel")
    shutil.copytree(workshop.other_model, odd / "encoder #1")
    values = yaml.safe_load((ROOT / "examples" / "stage2.yaml").read_text())
    values |= workshop.list_overrides(2, odd / "saves 2", model_name_or_path=str(odd / "mödel"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values | {"chatreid_encoder": str(odd / "encoder #1")}, allow_unicode=True))
    result = run_llamafactory("train", recipe, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert result.returncode == 0, result.stderr[-4000:]
    run = Run(odd / "saves 2", result)
    assert "world size: 2" in run.result.stdout + run.result.stderr
    assert run.result.stderr.count("vision tensors from") == 1  # one process composes, the other waits
    vision, others = split(run.read("chatreid_initial"))
    assert count_changed(vision, split(load_file(workshop.other_model / "model.safetensors"))[0]) == 0
    assert count_changed(others, split(load_file(workshop.model / "model.safetensors"))[1]) == 0
    assert count_changed(run.read(), run.read("chatreid_initial")) == len(vision) + len(others)
    assert (run.output / "chatreid_initial" / MARKER).is_file()
    assert not list(run.output.glob(".*.tmp"))


def test_help_knows_no_key_when_switched_off(run_llamafactory: RunCommand) -> None:
    """The keys in the usual case: tests/training/test_arguments.py."""
    stock = run_llamafactory("train", "-h", CHATREID_PLUGIN="0")
    assert stock.returncode == 0
    assert "--freeze_vision_tower" in stock.stdout
    assert "chatreid" not in stock.stdout.lower()


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

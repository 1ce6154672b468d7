"""The three stages with Qwen2.5-VL and Qwen3-VL through ``llamafactory-cli train``, as tests/e2e/test_training.py."""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatreid_plugin.demo.people import sample_people
from chatreid_plugin.demo.tiny_model import Family, TinySizes, write_tiny_model
from chatreid_plugin.training.checkpoint import find_vision_suffix


RunCommand = Callable[..., subprocess.CompletedProcess[str]]


def read(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def count_changed(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], vision: bool) -> tuple[int, int]:
    """Return how many vision tensors (or others) differ, and how many there are."""
    names = [name for name in first if (find_vision_suffix(name) is not None) == vision]
    assert first.keys() == second.keys()
    return sum(not torch.equal(first[name], second[name]) for name in names), len(names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "patch"),
    [
        pytest.param("qwen2_5_vl", 14, marks=pytest.mark.xdist_group("qwen2_5_vl")),
        pytest.param("qwen3_vl", 16, marks=pytest.mark.xdist_group("qwen3_vl")),
    ],
)
def test_three_stages(family: Family, patch: int, run_llamafactory: RunCommand, workshop: Any, tmp_path: Path) -> None:
    sizes = TinySizes(
        hidden=32, layers=2, heads=2, vision_hidden=32, vision_layers=2, patch_size=patch, vocabulary=600
    )
    base = tmp_path / "base"
    write_tiny_model(base, sample_people(20, 7), sizes=sizes, seed=3, family=family)
    outputs = {stage: tmp_path / f"stage{stage}" for stage in (1, 2, 3)}

    def train(stage: int, **changes: object) -> dict[str, torch.Tensor]:
        changes = {"model_name_or_path": str(base), "template": f"chatreid_{family}"} | changes
        overrides = workshop.list_overrides(stage, outputs[stage], **changes)
        result = run_llamafactory("train", f"examples/stage{stage}.yaml", overrides=overrides)
        assert result.returncode == 0, result.stderr[-3000:]
        log = (outputs[stage] / "trainer_log.jsonl").read_text().splitlines()
        losses = [line["loss"] for line in map(json.loads, log) if "loss" in line]
        assert len(losses) == 2 and all(map(math.isfinite, losses))
        return read(outputs[stage])

    first = train(1)
    assert count_changed(first, read(base), True)[0] == count_changed(first, read(base), True)[1]
    second = train(2, chatreid_encoder=str(outputs[1]))
    start = read(outputs[2] / "chatreid_initial")
    assert count_changed(start, first, True)[0] == count_changed(start, read(base), False)[0] == 0
    changed, count = count_changed(second, start, True)
    assert changed == count > 20
    third = train(3, model_name_or_path=str(outputs[2]))
    assert count_changed(third, second, True)[0] == 0
    changed, count = count_changed(third, second, False)
    assert changed == count

"""README's quickstart, line by line on Market-1501's layout, with captions and without, by what the recipes say.

Nothing but what fits a training run on a CPU is overridden: models, data sets, stages, encoder, rates and folders are
those that we ship.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from chatreid_plugin.cli import app
from chatreid_plugin.demo.layouts.folder import write_layout
from chatreid_plugin.resources import copy_resources
from chatreid_plugin.shards import read_json
from chatreid_plugin.training.checkpoint import find_vision_suffix


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("journey")]
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNNER = Path(__file__).with_name("llamafactory_commands.py")
# README: "On one GPU leave FORCE_TORCHRUN=1 out and add deepspeed=null"; on a CPU also bf16=false.
FIT_TRAINING = (
    "deepspeed=null bf16=false use_cpu=true gradient_checkpointing=false per_device_train_batch_size=2 "
    "gradient_accumulation_steps=1 dataloader_num_workers=1 max_steps=2 logging_steps=1 plot_loss=false"
).split()
FIT_BUILD = (
    "sources.0.allow_count_mismatch=true records.stage1=8 records.stage2=40 records.stage3=8 workers=1 "
    "gallery.max_size=4"
).split()
CAPTIONS = "sources.0.captions=data/captions.jsonl"
MODEL = "Qwen/Qwen2-VL-2B-Instruct"
SAVES = "saves/qwen2vl-2b/full"


def read_block(heading: str) -> list[list[str]]:
    """Return the words of each line of the first block of commands below a heading of the README."""
    found = re.search(rf"^## {heading}$.*?```bash\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    assert found is not None
    return [shlex.split(line, comments=True) for line in found.group(1).splitlines()]


BUILD, *TRAININGS = read_block("The three stages")


@contextmanager
def stand_in(folder: Path) -> Generator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Project:
    """A new user's folder: what ``chatreid init`` copies, the raw data, and the base model under its hub name."""

    folder: Path

    def build(self, *overrides: str) -> str:
        """Run README's first line and return what it prints."""
        assert BUILD[:2] == ["chatreid", "build"]
        with stand_in(self.folder):
            result = CliRunner().invoke(app, [*BUILD[1:], *FIT_BUILD, *overrides], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    def read(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "model.safetensors")

    def read_losses(self, name: str) -> list[float]:
        lines = map(json.loads, (self.folder / name / "trainer_log.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]


@dataclass(frozen=True)
class Walk:
    """The block's lines on one project: what ``build`` printed, and each training's exit code and log."""

    project: Project
    printed: str
    runs: list[tuple[int, str]]


@pytest.fixture(scope="module")
def walks(
    workshop: Any, llamafactory_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Walk, Walk]:
    """Walk the block with captions and without, then what ``build`` advises; all trainings from one import."""
    root = tmp_path_factory.mktemp("journey")
    captioned, plain = make_project(root / "captioned", workshop.model), make_project(root / "plain", workshop.model)
    lines = [
        {"person": f"{n:04d}", "captions": [f"A person in a {c} coat."], "attributes": {"upper_colour": c}}
        for n, c in enumerate(("red", "blue", "green", "white"), 1)
    ]
    (captioned.folder / "data" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    printed = captioned.build(CAPTIONS), plain.build()
    commands = [(captioned, command) for command in TRAININGS]
    commands += [(plain, command) for command in [*TRAININGS, *read_advice(printed[1])]]
    runs = run_trainings(commands, root, llamafactory_environment)
    return Walk(captioned, printed[0], runs[:3]), Walk(plain, printed[1], runs[3:])


def make_project(folder: Path, model: Path) -> Project:
    copy_resources(folder)
    write_layout("market1501", folder / "data" / "Market-1501-v15.09.15")
    (folder / MODEL).parent.mkdir()
    (folder / MODEL).symlink_to(model)
    return Project(folder)


def read_advice(printed: str) -> list[list[str]]:
    """Return the commands that ``chatreid build`` prints."""
    return [shlex.split(line) for line in printed.splitlines() if line.startswith("  FORCE_TORCHRUN=1")]


def run_trainings(
    commands: Sequence[tuple[Project, Sequence[str]]], logs: Path, environment: dict[str, str]
) -> list[tuple[int, str]]:
    """Run ``llamafactory-cli`` commands of README or of ``chatreid build``; return exit codes and logs."""
    arguments: list[tuple[str, list[str]]] = []
    for project, command in commands:
        assert command[:3] == ["FORCE_TORCHRUN=1", "llamafactory-cli", "train"]
        arguments.append((str(project.folder), [*command[2:], *FIT_TRAINING]))
    (logs / "commands.json").write_text(json.dumps(arguments))
    run = [sys.executable, str(RUNNER), str(logs / "commands.json"), str(logs)]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return [(code, (logs / f"{n}.log").read_text()) for n, code in enumerate(read_json(logs / "codes.json"))]


@pytest.fixture(scope="module")
def captioned(walks: tuple[Walk, Walk]) -> Project:
    """Return the project with captions, where all three stages have trained."""
    assert walks[0].printed.splitlines()[-3:] == [f"  {shlex.join(command)}" for command in TRAININGS]
    for code, log in walks[0].runs:
        assert code == 0, log[-4000:]
    return walks[0].project


def split(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the vision tensors, the merger included, and the others."""
    vision = {name: tensor for name, tensor in tensors.items() if find_vision_suffix(name) is not None}
    return vision, {name: tensor for name, tensor in tensors.items() if name not in vision}


def count_changed(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> int:
    assert first.keys() == second.keys()
    return sum(not torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_nothing_that_is_shipped_is_overridden_but_what_a_cpu_needs() -> None:
    recipe = (ROOT / "examples" / "stage2.yaml").read_text()
    shipped = set(re.findall(r"^([a-z_]+):", recipe, re.MULTILINE))
    kept = shipped - {override.partition("=")[0] for override in FIT_TRAINING}
    decides = "model_name_or_path image_max_pixels stage finetuning_type freeze_vision_tower chatreid_stage dataset "
    decides += "chatreid_encoder chatreid_projector chatreid_aspect dataset_dir template cutoff_len chatreid_lazy "
    decides += "output_dir learning_rate lr_scheduler_type warmup_ratio num_train_epochs save_only_model"
    assert set(decides.split()) <= kept
    assert [command[3:] for command in TRAININGS] == [[f"examples/stage{stage}.yaml"] for stage in (1, 2, 3)]


def test_stage_1_trains_every_part(captioned: Project) -> None:
    losses = captioned.read_losses(f"{SAVES}/stage1")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    before, after = captioned.read(MODEL), captioned.read(f"{SAVES}/stage1")
    assert count_changed(before, after) == len(before)


def test_stage_2_starts_from_stage_1s_encoder_and_the_fresh_decoder(captioned: Project) -> None:
    vision, others = split(captioned.read(f"{SAVES}/stage2/chatreid_initial"))
    assert len(vision) > 20
    assert count_changed(vision, split(captioned.read(f"{SAVES}/stage1"))[0]) == 0
    assert count_changed(others, split(captioned.read(MODEL))[1]) == 0
    after = captioned.read(f"{SAVES}/stage2")
    assert count_changed(vision | others, after) == len(after)
    assert not list((captioned.folder / SAVES / "stage2").glob(".*.tmp"))


def test_stage_3_leaves_the_encoder_bit_for_bit_and_trains_the_decoder(captioned: Project) -> None:
    vision, others = split(captioned.read(f"{SAVES}/stage2"))
    trained_vision, trained_others = split(captioned.read(f"{SAVES}/stage3"))
    assert count_changed(trained_vision, vision) == 0
    assert count_changed(trained_others, others) == len(others)


def test_what_was_trained_is_measured(captioned: Project) -> None:
    line = read_block("Evaluating")[0]
    assert line[:3] == ["python", "-m", "chatreid_plugin.eval"]
    with stand_in(captioned.folder):
        result = CliRunner().invoke(app, ["eval", *line[3:], "device=cpu", "max_queries=2"], catch_exceptions=False)
    assert result.exit_code == 0
    assert read_json(captioned.folder / "results" / "market1501" / "results.json")["metrics"]["mAP"] > 0


def test_without_captions_each_line_says_what_to_do_and_what_build_prints_trains(walks: tuple[Walk, Walk]) -> None:
    plain = walks[1]
    assert "Tasks without captions or attributes are left out. To train them, write a `captions` file" in plain.printed
    assert [command[3] for command in read_advice(plain.printed)] == ["examples/stage2.yaml", "examples/stage3.yaml"]
    *stopped, second, third = plain.runs
    expected = [
        "chatreid_stage1 (left out by `chatreid build`: no captions)",
        f"chatreid_encoder: {SAVES}/stage1 is not a folder. Train Stage 1 first",
        f"model_name_or_path: {SAVES}/stage2 is not a folder. Train Stage 2 first (examples/stage2.yaml)",
    ]
    for (code, log), message in zip(stopped, expected, strict=True):
        last = log.splitlines()[-1]
        assert code == 1 and last.startswith("chatreid: ConfigError: ") and message in last
        assert "Traceback" not in log
    for code, log in (second, third):
        assert code == 0, log[-4000:]
    assert (plain.project.folder / SAVES / "stage3" / "model.safetensors").is_file()

"""A lab's journey: the full recipe on all layouts, three stages, every evaluation; and README's without captions.

Nothing that is shipped is overridden but sizes and what a CPU needs: data sets, roots, models, stages, encoder, rates,
folders, manifests and filters are those of the files. Splits with a model each go through eval/README.md's loop.
"""

import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from chatreid_plugin.cli import app
from chatreid_plugin.demo.layouts import LAYOUTS, find_layout, write_layout
from chatreid_plugin.demo.layouts.renderer import Renderer
from chatreid_plugin.resources import copy_resources
from chatreid_plugin.shards import read_json
from chatreid_plugin.tasks import list_stage_tasks
from chatreid_plugin.training.checkpoint import find_vision_suffix


# All trainings count for the first test.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("journey"), pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# README: "On one GPU leave FORCE_TORCHRUN=1 out and add deepspeed=null"; on a CPU also bf16=false.
FIT_TRAINING = (
    "deepspeed=null bf16=false use_cpu=true gradient_checkpointing=false per_device_train_batch_size=2 "
    "gradient_accumulation_steps=1 dataloader_num_workers=1 max_steps=2 logging_steps=1 plot_loss=false"
).split()
FIT_BUILD = "records.stage1=8 records.stage2=40 records.stage3=80 workers=1 gallery.max_size=4".split()
FIT_EVALUATION = "model.device=cpu data.max_queries=2 output.report_queries=1".split()
# The recipe says null: an endpoint has not been asked yet.
CAPTIONS = "sources.0.captions=data/captions.jsonl"
FULL = ROOT / "examples" / "data_engine_full.yaml"
SOURCES: list[dict[str, Any]] = yaml.safe_load(FULL.read_text(encoding="utf-8"))["sources"]
EVALUATIONS = sorted(path.stem for path in (ROOT / "eval").glob("*.yaml"))
SPLITS = (1, 2)
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

    def run(self, command: Sequence[str], *overrides: str, exit_codes: Sequence[int] = (0,)) -> str:
        """Run a ``chatreid`` command of README or of a recipe and return what it prints."""
        with stand_in(self.folder):
            result = CliRunner().invoke(app, [*command[1:], *overrides], catch_exceptions=False)
        assert command[0] == "chatreid" and result.exit_code in exit_codes, result.output
        return result.stdout

    def prepare(self, command: Sequence[str], *overrides: str) -> str:
        """Run a command of the data engine on data sets smaller than the published ones."""
        sources = yaml.safe_load((self.folder / command[2]).read_text(encoding="utf-8"))["sources"]
        small = [f"sources.{number}.allow_count_mismatch=true" for number in range(len(sources))]
        return self.run(command, *FIT_BUILD, *small, *overrides, exit_codes=(0, 3) if "audit" in command else (0,))

    def read(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "model.safetensors")

    def read_losses(self, name: str) -> list[float]:
        lines = map(json.loads, (self.folder / name / "trainer_log.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]


@dataclass(frozen=True)
class Walk:
    """The lines on one project: what the data engine printed at last, and each training's exit code and log."""

    project: Project
    printed: str
    runs: list[tuple[int, str]]


@pytest.fixture(scope="module")
def walks(
    workshop: Any,
    split_commands: Callable[[int], list[list[str]]],
    run_command: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Walk, Walk]:
    """Walk with all data sets and captions, then README's block without captions and what ``build`` advises there.

    Of the splits that take a model each the first is trained in the loop's words.
    """
    root = tmp_path_factory.mktemp("journey")
    full, plain = make_project(root / "full", workshop.model), make_project(root / "plain", workshop.model)
    write_full_data(full.folder)
    write_layout("market1501", plain.folder / "data" / "Market-1501-v15.09.15")
    printed = [full.prepare(command, CAPTIONS) for command in read_launch()][-1], plain.prepare(BUILD)
    loop = split_commands(len(SPLITS))
    for command in [["chatreid", "parse", "examples/folder_of_crops.yaml"], *loop]:
        if command[0] == "chatreid":
            full.prepare(command)
    first = [["FORCE_TORCHRUN=1", *command] for command in loop if "dataset_dir=dataset_info/regdb_1" in command]
    commands = [(full, command) for command in [*TRAININGS, *first]]
    commands += [(plain, command) for command in [*TRAININGS, *read_advice(printed[1])]]
    runs = run_trainings(commands, run_command)
    return Walk(full, printed[0], runs[:5]), Walk(plain, printed[1], runs[5:])


def make_project(folder: Path, model: Path) -> Project:
    copy_resources(folder)
    (folder / MODEL).parent.mkdir()
    (folder / MODEL).symlink_to(model)
    return Project(folder)


def write_full_data(project: Path) -> None:
    """Write every data set of the full recipe where it looks for it, captions for one without, and one's own crops."""
    for source in SOURCES:
        layout = ":".join([source.get("parser", source["name"]), *filter(None, [source.get("variant")])])
        if layout != "cuhk03:labeled":  # in the same file as the detected ones
            LAYOUTS[find_layout(layout)](project / source["root"], 0)
    lines = [
        {"person": f"{n:04d}", "captions": [f"A person in a {c} coat."], "attributes": {"upper_colour": c}}
        for n, c in enumerate(("red", "blue", "green", "white"), 1)
    ]
    (project / "data" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    renderer = Renderer("mycrops")
    for person, camera, index in product(range(1, 5), (1, 2), range(2)):
        path = project / "data" / "mycrops" / f"{person:03d}" / f"{camera:02d}_{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        renderer.render(person, camera, index)[0].save(path)


def read_launch() -> list[list[str]]:
    """Return the commands that the full recipe's head names for one machine, in its order."""
    head = FULL.read_text(encoding="utf-8").partition("# Cluster")[0]
    lines = re.findall(r"^# .*?(chatreid (?!list|inspect).*?)(?:   |$)", head, re.MULTILINE)
    return [line.split() for line in lines]


def read_advice(printed: str) -> list[list[str]]:
    """Return the commands that ``chatreid build`` prints."""
    return [shlex.split(line) for line in printed.splitlines() if line.startswith("  FORCE_TORCHRUN=1")]


def run_trainings(
    commands: Sequence[tuple[Project, Sequence[str]]], run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> list[tuple[int, str]]:
    """Run ``llamafactory-cli`` commands of README or of ``chatreid build``; return exit codes and logs."""
    runs: list[tuple[int, str]] = []
    for project, command in commands:
        assert command[:3] == ["FORCE_TORCHRUN=1", "llamafactory-cli", "train"]
        run = run_command([*command[1:], *FIT_TRAINING], project.folder)
        runs.append((run.returncode, run.stdout + run.stderr))
    return runs


@pytest.fixture(scope="module")
def captioned(walks: tuple[Walk, Walk]) -> Project:
    """Return the project with all data sets, where the three stages have trained, and both of RegDB's first split."""
    assert walks[0].printed.splitlines()[-3:] == [f"  {shlex.join(command)}" for command in TRAININGS]
    for code, log in walks[0].runs:
        assert code == 0, log[-4000:]
    saves = walks[0].project.folder / "saves"
    for run in [f"{name}_{split}" for name in ("regdb", "cuhk03") for split in SPLITS]:
        if not (saves / run).exists():
            (saves / run).symlink_to(saves / "regdb_1")
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


def test_full_recipe_trains_every_task(walks: tuple[Walk, Walk]) -> None:
    built = read_json(walks[0].project.folder / "dataset_info" / "dataset_info.json")
    expected = [f"chatreid_stage{stage}_{task.name}" for stage in (1, 2, 3) for task in list_stage_tasks(stage)]
    assert list(built) == expected
    assert "left out" not in walks[0].printed


@pytest.mark.parametrize("name", EVALUATIONS)
def test_what_was_trained_is_measured(captioned: Project, name: str) -> None:
    path = f"eval/{name}.yaml"
    taken_apart = re.search(r"\n  manifest: .*\{trial\}", (ROOT / path).read_text(encoding="utf-8"))
    splits = [f"data.splits={list(SPLITS)}"] if taken_apart else []
    captioned.run(["chatreid", "eval", path], *FIT_EVALUATION, *splits)
    found = read_json(captioned.folder / "results" / name / "results.json")
    assert 0 < found["metrics"]["mAP"] <= 1
    assert found["protocol"]["pairs_scored"] > 0
    assert [text for text in found["warnings"] if "queries" not in text] == []


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

"""Every launcher with every stage: does it swap and freeze bit for bit, and train as one process does?

Ten steps of four records whose answers have one length, tiny random model: two processes with gloo on CPU, or NCCL
where there are GPUs, of which NCCL gives each process its own: on a machine with one, the launchers of several
processes start one. Prints a Markdown table, a row as its cells end; exit code 1 if a cell fails.
Run: OMP_NUM_THREADS=1 python tests/bench/run_launchers.py [--launcher NAME ...] [--stage NAME ...] [--keep FOLDER]
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from launcher_drivers import ELASTIC, FSDP, PROCESSES, RAY, kill_one_worker
from safetensors.torch import load_file

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.demo.people import sample_people
from chatreid_plugin.demo.tiny_model import TinySizes, write_tiny_model
from chatreid_plugin.demo.world import write_world
from chatreid_plugin.engine.build import build_datasets
from chatreid_plugin.training.model import find_part, list_trained_parts


REPOSITORY = Path(__file__).parents[2]
STEPS, RECORDS_PER_STEP = 10, 4
DATASET = "chatreid_stage2_image_to_image_one_to_one"
# Losses in float32 differ by the order of sums only.
TOLERANCE = 1e-4
STAGES = ("stage1", "stage2", "stage3", "stage2_lora", "stage3_lora")
# What turns a recipe for 8 GPUs into one for a model of a hundred thousand parameters.
OVERRIDES: dict[str, object] = {
    "deepspeed": "null",
    "bf16": "false",
    "gradient_checkpointing": "false",
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_steps": 5,
    "plot_loss": "false",
    "dataloader_num_workers": 0,
    "learning_rate": "1.0e-3",
    "warmup_ratio": 0.0,
    "image_max_pixels": 8192,
    "ddp_timeout": 300,
    "dataset": DATASET,
}


@dataclass(frozen=True)
class Inputs:
    """Folders that all cells share: records, the model and the encoder that Stage 2 takes from elsewhere."""

    dataset_dir: Path
    model: Path
    encoder: Path


def make_inputs(root: Path) -> Inputs:
    """Write a small world, yes-or-no records (all answers have one length) and two tiny random models."""
    write_world(root / "world", train_people=10, test_people=2, cameras=2, images_per_camera=2)
    source = {"name": "market1501", "root": root / "world", "allow_count_mismatch": True}
    settings = {
        "sources": [source],
        "manifest_dir": root / "manifests",
        "output_dir": root / "dataset_info",
        "records": {"stage2": RECORDS_PER_STEP * STEPS},
        "stage2_ratios": {"image_to_image_one_to_one": 1.0},
        "prompt_variants": 1,
    }
    build_datasets(BuildSettings.model_validate(settings))
    sizes = TinySizes(hidden=32, layers=2, heads=2, vision_hidden=32, vision_layers=2, patch_size=14, vocabulary=600)
    folders = [root / "model", root / "encoder"]
    for seed, folder in enumerate(folders, start=1):
        write_tiny_model(folder, sample_people(20, 7), sizes=sizes, seed=seed)
    return Inputs(root / "dataset_info", *folders)


@dataclass(frozen=True)
class Launcher:
    """A launcher: its environment, what its command starts with, its overrides, and what goes on beside it."""

    environment: dict[str, str]
    command: tuple[str, ...] = ("llamafactory-cli", "train")
    overrides: tuple[tuple[str, object], ...] = ()
    processes: int = PROCESSES
    nodes: int = 1
    beside: Callable[[int, Path], None] | None = None


def find_free_port() -> str:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return str(opened.getsockname()[1])


def list_launchers() -> dict[str, Launcher]:
    """Return name -> launcher; on CPU, FSDP and Ray go through a driver that lifts their refusals."""
    torchrun = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(PROCESSES)}
    node = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
    elastic = torchrun | {"RDZV_ID": "chatreid", "MAX_RESTARTS": "1", "MASTER_ADDR": "127.0.0.1"}
    # torch 2.11 would keep its store over a restart, and with it the addresses of the processes that died.
    elastic |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    zero = [(("deepspeed", f"examples/deepspeed/ds_z{stage}_config.json"),) for stage in (2, 3)]
    return {
        "one process": Launcher({}, processes=1),
        "torchrun": Launcher(torchrun),
        "ZeRO-2": Launcher(torchrun, overrides=zero[0]),
        "ZeRO-3": Launcher(torchrun, overrides=zero[1]),
        "two nodes": Launcher(node, nodes=2),
        "elastic restart": Launcher(elastic, ELASTIC, (("overwrite_output_dir", "false"),), beside=kill_one_worker),
        "FSDP": Launcher({}, command=FSDP),
        "Ray": Launcher({"USE_RAY": "1"}, command=RAY, overrides=(("ray_num_workers", PROCESSES),)),
    }


@dataclass(frozen=True)
class Cell:
    """A launcher with a stage, where it writes, and its output."""

    name: str
    launcher: Launcher
    stage: str
    output: Path

    @property
    def number(self) -> int:
        return int(self.stage.removeprefix("stage")[0])

    def list_overrides(self, inputs: Inputs) -> dict[str, object]:
        values = OVERRIDES | {"dataset_dir": inputs.dataset_dir, "output_dir": self.output}
        values |= {"model_name_or_path": inputs.model}
        values |= {"per_device_train_batch_size": RECORDS_PER_STEP // self.launcher.processes}
        if self.number == 2:
            values["chatreid_encoder"] = inputs.encoder
        # With use_cpu DeepSpeed would not learn of the other process.
        if not torch.cuda.is_available() and "deepspeed" not in dict(self.launcher.overrides):
            values["use_cpu"] = "true"
        return values | dict(self.launcher.overrides)

    def run(self, inputs: Inputs) -> str:
        """Run it; return an empty string, or the last words of the node that failed."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | self.launcher.environment
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        if not torch.cuda.is_available():
            environment["DS_ACCELERATOR"] = "cpu"
        if self.launcher.environment.get("FORCE_TORCHRUN"):
            environment["MASTER_PORT"] = find_free_port()
        arguments = [f"{key}={value}" for key, value in self.list_overrides(inputs).items()]
        command = [*self.launcher.command, f"examples/{self.stage}.yaml", *arguments]
        logs = [self.output.with_name(f"{self.output.name}.node{rank}.log") for rank in range(self.launcher.nodes)]
        nodes: list[subprocess.Popen[bytes]] = []
        for rank, log in enumerate(logs):
            own = {"NODE_RANK": str(rank)} if self.launcher.nodes > 1 else {}
            if own and torch.cuda.is_available():
                own["CUDA_VISIBLE_DEVICES"] = str(rank)
            with log.open("wb") as file:
                options: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": REPOSITORY}
                nodes.append(subprocess.Popen(command, env=environment | own, **options))
        if self.launcher.beside is not None:
            self.launcher.beside(nodes[0].pid, self.output)
        codes = [node.wait() for node in nodes]
        failed = [log for log, code in zip(logs, codes, strict=True) if code]
        return failed[0].read_text(errors="replace")[-3000:] if failed else ""

    def read_losses(self) -> list[float]:
        """Return the loss of each step; after a restart, the last one that was logged for it."""
        losses: dict[int, float] = {}
        for line in (self.output / "trainer_log.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if "loss" in entry:
                losses[entry["current_steps"]] = entry["loss"]
        return [losses[step] for step in sorted(losses)]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint in one file."""
    return load_file(folder / "model.safetensors")


def read_trained(start: Path, output: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that training wrote; an adapter is merged into what it started from."""
    if not (output / "adapter_model.safetensors").is_file():
        return read_tensors(output)
    from peft import PeftModel
    from transformers import Qwen2VLForConditionalGeneration

    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(output)).merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        return read_tensors(Path(folder))


def check_swap(cell: Cell, inputs: Inputs) -> str:
    """Return what is wrong with the checkpoint that Stage 2 composed."""
    composed, encoder, decoder = map(read_tensors, (cell.output / "chatreid_initial", inputs.encoder, inputs.model))
    sources = {name: decoder if find_part(name) == "language" else encoder for name in composed}
    wrong = [name for name, tensor in composed.items() if not torch.equal(tensor, sources[name][name])]
    return f"{len(wrong)} tensors are not the swap's, first {wrong[0]}" if wrong else ""


def check_freeze(cell: Cell, start: Path) -> str:
    """Return what is wrong with what changed: the stage's parts, and nothing else, bit for bit."""
    before, after = read_tensors(start), read_trained(start, cell.output)
    changed = {name: not torch.equal(tensor, after[name].to(tensor.dtype)) for name, tensor in before.items()}
    trained = list_trained_parts(cell.number, "encoder")
    faults: list[str] = []
    for part in ("vision", "projector", "language"):
        flags = [flag for name, flag in changed.items() if find_part(name) == part]
        if part not in trained and any(flags):
            faults.append(f"{sum(flags)} {part} tensors changed")
        # An adapter reaches linear layers only.
        elif part in trained and not (any(flags) if cell.stage.endswith("lora") else all(flags)):
            faults.append(f"{len(flags) - sum(flags)} of {len(flags)} {part} tensors did not change")
    return ", ".join(faults)


def judge(cell: Cell, inputs: Inputs, alone: list[float]) -> str:
    """Run one cell and return what the table says of it."""
    if words := cell.run(inputs):
        print(f"--- {cell.name}, {cell.stage}\n{words}", file=sys.stderr)
        return "FAILED: " + words.strip().splitlines()[-1][:100]
    start = cell.output / "chatreid_initial" if cell.number == 2 else inputs.model
    losses = cell.read_losses()
    alone = alone or losses
    difference = max(abs(a - b) / b for a, b in zip(losses, alone, strict=False))
    faults = [check_swap(cell, inputs) if cell.number == 2 else "", check_freeze(cell, start)]
    if len(losses) != STEPS or difference > TOLERANCE:
        faults.append(f"losses differ: {losses} where one process has {alone}")
    text = "; ".join(filter(None, faults))
    return f"FAILED: {text}" if text else "base" if alone is losses else f"run, {difference:.0e}"


def main() -> int:
    """Run the cells that were asked for and print the table."""
    launchers = list_launchers()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launcher", action="append", choices=list(launchers), help="only these (and one process)")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only these")
    parser.add_argument("--keep", type=Path, help="write here and keep it")
    options = parser.parse_args()
    names = ["one process", *(name for name in options.launcher or launchers if name != "one process")]
    stages: list[str] = options.stage or list(STAGES)
    with tempfile.TemporaryDirectory() as temporary:
        root: Path = options.keep or Path(temporary)
        inputs = make_inputs(root)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{datetime.now(UTC):%Y-%m-%d}, {device}, {PROCESSES} process(es), largest relative loss gap\n")
        print("| launcher | " + " | ".join(stages) + " |\n|" + "---|" * (len(stages) + 1), flush=True)
        failed = False
        alone: dict[str, list[float]] = {}
        for name in names:
            cells: list[str] = []
            for stage in stages:
                cell = Cell(name, launchers[name], stage, root / f"{name}_{stage}".replace(" ", "_"))
                cells.append(judge(cell, inputs, alone.get(stage, [])))
                print(f"{name}, {stage}: {cells[-1]}", file=sys.stderr, flush=True)
                failed |= cells[-1].startswith("FAILED")
                if name == "one process" and not cells[-1].startswith("FAILED"):
                    alone[stage] = cell.read_losses()
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

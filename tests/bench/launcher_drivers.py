"""What run_launchers.py needs beside the launchers: CPU versions of three of them, and a rank that dies.

LLaMA-Factory's and accelerate's own code does the work in each; what refuses a machine without GPUs is replaced.
"""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import torch


HERE = Path(__file__)
# Two, on GPUs one on each.
PROCESSES = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
ACCELERATE = (
    *("accelerate", "launch", "--config_file", "examples/accelerate/fsdp2_config.yaml"),
    *("--num_processes", str(PROCESSES), "--main_process_port", "0"),
)
if torch.cuda.is_available():
    ELASTIC: tuple[str, ...] = ("llamafactory-cli", "train")
    FSDP: tuple[str, ...] = (*ACCELERATE, "-m", "llamafactory.launcher")
    RAY: tuple[str, ...] = ELASTIC
else:
    ELASTIC = (sys.executable, str(HERE), "elastic", "train")
    FSDP = (*ACCELERATE, str(HERE), "fsdp")
    RAY = (sys.executable, str(HERE), "ray")


def kill_one_worker(launcher: int, output: Path) -> None:
    """Wait for the first checkpoint, then kill one rank as a failing machine would."""
    while not (output / "checkpoint-5" / "trainer_state.json").is_file():
        if not psutil.pid_exists(launcher) or psutil.Process(launcher).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.02)
    children = psutil.Process(launcher).children(recursive=True)
    ranks = [child for child in children if "LOCAL_RANK" in child.environ()]
    os.kill(ranks[-1].pid, signal.SIGKILL)


def launch_elastic_on_cpu() -> None:
    """Run LLaMA-Factory's own launcher, with workers that can read an optimizer's state onto the device ``cpu:0``."""
    from llamafactory import launcher
    from llamafactory.cli import main

    launcher.__file__ = f"{HERE} elastic-worker"  # stands in a command that is cut at the spaces
    main()


def run_elastic_worker() -> None:
    """Train; transformers 5.5 (trainer.py) asks several processes for ``cpu:0``, torch 2.11 knows ``cpu`` only."""
    from llamafactory.train.tuner import run_exp

    torch.serialization.register_package(5, lambda _: None, lambda data, place: data if place == "cpu:0" else None)
    run_exp()


def run_ray_on_cpu() -> None:
    """Run LLaMA-Factory's Ray mode with one CPU a worker.

    LLaMA-Factory 0.9.5 (train/trainer_utils.py) counts each CPU as a device and reserves ten CPUs for each, which no
    machine without GPUs can meet.
    """
    import ray
    from llamafactory.train import tuner
    from ray.util.placement_group import placement_group

    get_config = tuner.get_ray_remote_config_for_worker

    def reserve(workers: int) -> object:
        bundles = [{"CPU": 1} for _ in range(workers)]
        return placement_group(bundles, strategy="PACK"), bundles[0]

    def configure(**options: object) -> object:
        return get_config(**options) | {"num_cpus": 1}

    tuner.get_placement_group = reserve
    tuner.get_ray_remote_config_for_worker = configure
    ray.init(num_cpus=2, include_dashboard=False)
    # Otherwise LLaMA-Factory asks Ray's dashboard, which `pip install "ray[default]"` brings.
    sys.argv.append(f"master_addr={ray.nodes()[0]['NodeManagerAddress']}")
    tuner.run_exp()


def run_fsdp_on_cpu() -> None:
    """Train under FSDP with gloo; accelerate 1.11 (state.py) takes FSDP up for accelerators only."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from llamafactory.train.tuner import run_exp

    initialize = AcceleratorState.__init__

    def initialize_with_fsdp(self: AcceleratorState, *args: object, **kwargs: object) -> None:
        initialize(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            own = {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
            self.__dict__.update(own, fsdp_plugin=kwargs["fsdp_plugin"])
            PartialState._shared_state.update(own)  # noqa: SLF001 - copied over at the next use

    AcceleratorState.__init__ = initialize_with_fsdp
    run_exp()


if __name__ == "__main__":
    commands = {
        "elastic": launch_elastic_on_cpu,
        "elastic-worker": run_elastic_worker,
        "ray": run_ray_on_cpu,
        "fsdp": run_fsdp_on_cpu,
    }
    commands[sys.argv.pop(1)]()

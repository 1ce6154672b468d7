"""How long `llamafactory-cli train examples/stage2.yaml` takes to its first step on 3,000,000 records, and its memory.

The records are those of bench_engine.py; the images are plain JPEG files, one for each size, that all paths link to.
The model is tiny and random. Run: OMP_NUM_THREADS=1 python tests/bench/bench_lazy_start.py [--records N]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench_engine import make_records, prepare
from PIL import Image

from chatreid_plugin.demo.people import sample_people
from chatreid_plugin.demo.tiny_model import TinySizes, write_tiny_model


REPOSITORY = Path(__file__).parents[2]
# What turns the recipe for 8 GPUs into one step on a CPU.
OVERRIDES = {
    "deepspeed": "null",
    "bf16": "false",
    "use_cpu": "true",
    "gradient_checkpointing": "false",
    "gradient_accumulation_steps": "1",
    "max_steps": "1",
    "logging_steps": "1",
    "save_steps": "1000",
    "plot_loss": "false",
    "image_max_pixels": "8192",
}


def write_images(folder: Path) -> None:
    """Write one plain image of each size and link every path of the manifest to the one of its size."""
    sizes = folder / "sizes"
    sizes.mkdir(parents=True)
    for record in make_records():
        target = sizes / f"{record.width}x{record.height}.jpg"
        if not target.exists():
            Image.new("RGB", (record.width, record.height), (record.width, 90, 60)).save(target)
        path = folder / "images" / record.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


@dataclass(frozen=True)
class Result:
    """One start: seconds to the first step, GB of the largest process, GB that it left in its cache."""

    first_step: float
    memory: float
    cache: float


def train(folder: Path, name: str) -> Result:
    """Run the recipe for one step; the seconds count from the start of the command to the step's line in the log."""
    output, cache = folder / name, folder / "cache"
    shutil.rmtree(output, ignore_errors=True)
    values = OVERRIDES | {
        "dataset_dir": str(folder / "out"),
        "model_name_or_path": str(folder / "decoder"),
        "chatreid_encoder": str(folder / "encoder"),
        "output_dir": str(output),
    }
    # The console script beside this Python.
    cli = str(Path(sys.executable).with_name("llamafactory-cli"))
    command = [cli, "train", "examples/stage2.yaml", *(f"{key}={value}" for key, value in values.items())]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    log = output / "trainer_log.jsonl"
    start = time.perf_counter()
    with (folder / f"{name}.log").open("w") as text:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=text, stderr=text)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        while ended == 0 and not log.is_file():
            time.sleep(0.05)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        if ended == 0:
            _, status, usage = os.wait4(process.pid, 0)
    if status != 0 or not log.is_file():
        raise SystemExit((folder / f"{name}.log").read_text()[-4000:])
    # Of the largest of the command's processes: the data loader's workers are among them.
    memory = usage.ru_maxrss * 1024 / 1e9
    left = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 1e9 if cache.exists() else 0.0
    return Result(seconds, memory, left)


def main() -> None:
    """Print the first start, with an empty cache, and the second one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=3_000_000)
    parser.add_argument("--folder", type=Path, help="keep the records here instead of in a temporary folder")
    arguments = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "out").exists():
            recipe = prepare(folder)
            write_images(folder)
            build = [sys.executable, "-m", "chatreid_plugin", "build", str(recipe)]
            silent = subprocess.DEVNULL
            subprocess.run([*build, f"records.stage2={arguments.records}"], check=True, stdout=silent, stderr=silent)
            sizes = TinySizes(
                hidden=32, layers=2, heads=2, vision_hidden=32, vision_layers=2, patch_size=14, vocabulary=600
            )
            for seed, name in enumerate(("encoder", "decoder")):
                write_tiny_model(folder / name, sample_people(20, 7), sizes=sizes, seed=seed)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for name in ("first start", "second start"):
            result = train(folder, name.replace(" ", "_"))
            print(
                f"{arguments.records:,} records, {name}: first step after {result.first_step:.1f} s, at most "
                f"{result.memory:.2f} GB a process, {result.cache:.2f} GB of cache",
                flush=True,
            )


if __name__ == "__main__":
    main()

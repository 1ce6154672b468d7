"""How long 300,000 and 3,000,000 Stage-2 records take from a manifest of 100,000 images, and what memory.

No image files are needed. Run: OMP_NUM_THREADS=1 python tests/bench/bench_engine.py [--small N] [--large N] [--ray]
or: ... --look-alikes
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from chatreid_plugin.config import BuildSettings, load_settings
from chatreid_plugin.engine.look_alikes import Appearances, find_nearest
from chatreid_plugin.engine.manifests import describe_origin, find_manifest
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import write_manifest


PEOPLE, CAMERAS, IMAGES_PER_PERSON = 5000, 6, 20
COLOURS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")


def make_records(people: int = PEOPLE) -> list[ImageRecord]:
    """Return 20 training images of each of the people, with captions of 35 words and 10 attributes."""
    rng = np.random.default_rng(0)
    records: list[ImageRecord] = []
    for person in range(people):
        looks = {f"attribute_{number}": f"value {rng.integers(6)}" for number in range(9)}
        looks["upper_colour"] = COLOURS[int(rng.integers(len(COLOURS)))]
        text = f"Person {person} " + " ".join(f"{name} {value}," for name, value in looks.items())
        for image in range(IMAGES_PER_PERSON):
            path = f"train/{person:04d}/{image:03d}.jpg"
            width, height = int(rng.integers(48, 160)), int(rng.integers(128, 384))
            record = ImageRecord(
                f"big/{path}",
                "big",
                "train",
                path,
                f"big:{person}",
                str(image % CAMERAS),
                width,
                height,
                captions=(f"{text} seen from side {image % 4}.",),
                attributes=looks,
            )
            records.append(record)
    return records


def prepare(folder: Path) -> Path:
    """Write the manifest and a recipe that reads it; return the recipe."""
    recipe = folder / "recipe.yaml"
    settings = {
        "sources": [{"name": "big", "parser": "market1501", "root": str(folder / "images")}],
        "manifest_dir": str(folder / "manifests"),
        "output_dir": str(folder / "out"),
        "records": {"stage2": 1},
    }
    recipe.write_text(yaml.safe_dump(settings))
    loaded = load_settings(recipe, [], BuildSettings)
    source = loaded.sources[0]
    write_manifest(find_manifest(loaded, source.name), make_records(), source.root, describe_origin(source))
    return recipe


def digest_folder(folder: Path) -> str:
    """Return a hash over names and bytes of all shards."""
    digest = hashlib.blake2b()
    for path in sorted(folder.rglob("*.parquet")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """One build: seconds of the command, and of drawing and writing alone; GB of the largest process; shards' hash."""

    command: float
    writing: float
    memory: float
    digest: str


def build(recipe: Path, records: int, **settings: object) -> Result:
    """Run ``chatreid build``."""
    output = recipe.parent / "out"
    shutil.rmtree(output, ignore_errors=True)
    overrides = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "chatreid_plugin", "build", str(recipe), "--json", f"records.stage2={records}"]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, *overrides], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    seconds = time.perf_counter() - start
    # Of the largest of all processes that have ended: the workers of the command are among them.
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return Result(seconds, json.loads(done.stdout)["seconds"], memory, digest_folder(output))


def time_look_alikes() -> str:
    """Return what finding look-alikes takes at MSMT17's size: random features, every person in five cameras."""
    images, people, cameras, width = 32_621, 1_041, 15, 1_536
    rng = np.random.default_rng(0)
    persons = np.sort(rng.integers(people, size=images))
    seen_by = rng.random((people, cameras)).argsort(axis=1)[:, :5]
    groups = seen_by[persons, rng.integers(5, size=images)]
    features = rng.standard_normal((images, width), dtype=np.float32)
    start = time.process_time()
    nearest = find_nearest(Appearances(persons, groups), groups, features, "features")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds = time.process_time() - start
    return f"{images:,} images: {seconds:.1f} CPU seconds, {memory:.2f} GB, {nearest.nbytes / 1e6:.1f} MB kept"


def main() -> None:
    """Print a line per run and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=300_000)
    parser.add_argument("--large", type=int, default=3_000_000)
    parser.add_argument("--ray", action="store_true", help="also build the small set on Ray and compare the files")
    parser.add_argument("--look-alikes", action="store_true", help="only find look-alikes by features")
    arguments = parser.parse_args()
    if arguments.look_alikes:
        print(time_look_alikes())
        return
    print(f"{len(os.sched_getaffinity(0))} cores")
    small: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare(Path(folder))
        small["one worker"] = build(recipe, arguments.small, workers=1)
        small["all cores"] = build(recipe, arguments.small)
        if arguments.ray:
            small["ray"] = build(recipe, arguments.small, executor="ray")
        large = build(recipe, arguments.large)
    lines = [
        *((name, arguments.small, result) for name, result in small.items()),
        ("all cores", arguments.large, large),
    ]
    for name, records, result in lines:
        print(
            f"{records:>9,} records, {name:10}: command {result.command:5.1f} s, writing {result.writing:5.1f} s "
            f"({records / result.writing:,.0f} records/s), at most {result.memory:.2f} GB a process, {result.digest}"
        )
    share, first = arguments.small / arguments.large, small["all cores"]
    print(
        f"small / large, of the share {share:g}: command {first.command / large.command / share:.2f}, "
        f"writing {first.writing / large.writing / share:.2f}"
    )
    print(f"identical shards from every executor: {len({result.digest for result in small.values()}) == 1}")


if __name__ == "__main__":
    main()

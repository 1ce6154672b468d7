"""The demo: synthetic world, tiny model, the three shipped recipes through llamafactory-cli, evaluation, a table.

Each step is the command a user would type, printed before it runs; a finished step is not run again.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..errors import ConfigError, UpstreamError
from ..resources import find_resource_root
from ..shards import read_json, write_json
from .world import write_world


@dataclass(frozen=True, slots=True)
class DemoSizes:
    """How large the demo is; the defaults take about 20 minutes on 2 cores.

    The decoder's warm-up decides what matching can come to. With 500 steps that was luck: with one tokenizer Stage 2
    gave mAP 56, with the next 28 to 35 whatever the records and the code; with 900 steps and the latter it gave 51.6,
    and 38.2 with seed 1.
    """

    train_people: int = 600
    test_people: int = 40
    warm_up_steps: int = 900
    steps: tuple[int, int, int] = (700, 800, 150)
    records: tuple[int, int, int] = (16000, 20000, 4000)
    batch_size: int = 32
    queries: int = 80


QUICK = DemoSizes(24, 6, 2, (2, 2, 2), (64, 200, 64), 4, 6)

# One size for all crops: the tiny model has no capacity to learn several scales. Real recipes keep native sizes.
PIXELS = "8192"
BUILD_RECIPE = """\
sources:
  - {{name: world, parser: market1501, root: world, captions: world/captions.jsonl, allow_count_mismatch: true}}
records: {{stage1: {0}, stage2: {1}, stage3: {2}}}
prompt_variants: 1
seed: {3}
gallery: {{min_size: 2, max_size: 5}}
# Far more one-to-one matching than the paper's ratios: the loss is a mean over answer tokens, and next to comparisons
# of 140 tokens a "Yes" would weigh next to nothing in the few steps there are.
stage2_ratios:
  image_to_image_one_to_one: 0.90
  image_to_image_many_to_many: 0.03
  text_to_image_one_to_one: 0.04
  text_to_image_many_to_one: 0.012
  text_to_image_one_to_many: 0.012
  attribute_comparison: 0.003
  attribute_prediction: 0.003
stage3_ratios: {{image_to_image_one_to_one: 0.95, standard_reid: 0.05}}
"""
# Learning rates for a model of a million parameters; the recipes' own are for 2 billion. Above 1e-3 the first steps of
# Stage 2 wipe out what the decoder knows about comparing, and it does not come back within the demo.
LEARNING_RATES = ("2.0e-3", "4.0e-4", "2.0e-4")


def list_training_overrides(stage: int, sizes: DemoSizes, seed: int) -> list[str]:
    """Return the key=value overrides that turn the real recipe of a stage into the demo's."""
    inputs = {
        1: ["model_name_or_path=tiny_model"],
        2: ["model_name_or_path=tiny_model", "chatreid_encoder=saves/stage1"],
        3: ["model_name_or_path=saves/stage2"],
    }[stage]
    return [
        *inputs,
        f"output_dir=saves/stage{stage}",
        f"max_steps={sizes.steps[stage - 1]}",
        f"per_device_train_batch_size={sizes.batch_size}",
        f"learning_rate={LEARNING_RATES[stage - 1]}",
        f"image_max_pixels={PIXELS}",
        f"image_min_pixels={PIXELS}",
        "gradient_accumulation_steps=1",
        "gradient_checkpointing=false",
        "bf16=false",
        "deepspeed=null",
        "dataloader_num_workers=1",
        "save_only_model=true",
        f"seed={42 + seed}",  # LLaMA-Factory's own default and what is added to it
    ]


def list_evaluations(sizes: DemoSizes) -> dict[str, list[str]]:
    """Return row name -> key=value overrides of ``eval/market1501.yaml``."""
    data = ["data.manifest=manifests/world.parquet", f"data.max_queries={sizes.queries}"]
    pixels = [f"model.image_max_pixels={PIXELS}", f"model.image_min_pixels={PIXELS}"]
    rows = {
        "random": ["scoring.backend=random", "filter.source=none"],
        "colour features": ["scoring.backend=features", "filter.source=colour", "filter.tau=-1"],
        "untrained model": ["model.model_name_or_path=tiny_model", "filter.source=none", *pixels],
    }
    for stage in (1, 2, 3):
        rows[f"after Stage {stage}"] = [
            f"model.model_name_or_path=saves/stage{stage}",
            f"model.chatreid_stage={stage}",
            "filter.source=none",
            *pixels,
        ]
    rows["after Stage 3, filtered"] = ["model.model_name_or_path=saves/stage3", "filter.top_k=20", *pixels]
    return {
        name: [*data, *overrides, f"output.output_dir=results/{name.replace(' ', '_').replace(',', '')}"]
        for name, overrides in rows.items()
    }


class DemoSteps:
    """Runs commands in the demo's folder, each once: a finished step whose inputs have not changed is left alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last_finished = ""

    def run(self, name: str, command: list[str]) -> None:
        """Print a command, run it with its output in a log, and note that it is done.

        Raises:
            UpstreamError: the command failed; names the log and shows its end.
        """
        marker = self.folder / "steps" / f"{name}.json"
        # The finishing time of the step before tells whether what this one reads has been made again.
        inputs = {"command": command, "after": self._last_finished}
        if marker.is_file() and (done := read_json(marker))["inputs"] == inputs:
            print(f"[{name}] done before", flush=True)
            self._last_finished = done["finished"]
            return
        shown = ["python", *command[1:]] if command[0] == sys.executable else command
        print(f"\n[{name}] {shlex.join(shown)}", flush=True)
        started = time.monotonic()
        log = self.folder / "steps" / f"{name}.log"
        failed = self._run_logged(command, log)
        seconds = round(time.monotonic() - started, 1)
        if failed:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise UpstreamError(f"Step {name} failed with exit code {failed}; the end of {log}:\n{tail}")
        self._last_finished = datetime.now(UTC).isoformat()
        write_json(marker, {"inputs": inputs, "seconds": seconds, "finished": self._last_finished})
        print(f"[{name}] {seconds:.0f} s", flush=True)

    def _run_logged(self, command: list[str], log: Path) -> int:
        environment = dict(os.environ)
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)))))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            return subprocess.run(
                command, cwd=self.folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            ).returncode


def _write_inputs(folder: Path, sizes: DemoSizes, seed: int) -> None:
    if not (folder / "world").is_dir():
        summary = write_world(
            folder / "world",
            train_people=sizes.train_people,
            test_people=sizes.test_people,
            junk=10,
            distractors=10,
            workers=2,
        )
        print(
            f"[world] {summary.train_images} training, {summary.query_images} query, {summary.gallery_images} gallery"
        )
    recipe = BUILD_RECIPE.format(*sizes.records, seed)
    (folder / "build.yaml").write_text(recipe, encoding="utf-8")
    print(f"\nbuild.yaml:\n{recipe}")


def run_demo(output: Path, *, quick: bool = False, overwrite: bool = False, seed: int = 0) -> None:
    """Run the whole way in ``output`` and print mAP and Rank-1 of chance, baseline and every stage.

    Args:
        output: folder for everything; an interrupted demo goes on where it stopped.
        quick: sizes that show the way but learn nothing, for tests.
        overwrite: remove what an earlier demo left in ``output``.
        seed: of the model's weights, the records and the training; the world is the same.

    Raises:
        ConfigError: ``output`` holds something else.
        UpstreamError: a step failed.
    """
    marker = output / "chatreid_demo.json"
    if output.exists() and any(output.iterdir()) and not marker.is_file():
        raise ConfigError(f"{output} is not empty and was not made by the demo; choose another folder.")
    if overwrite and output.exists():
        shutil.rmtree(output)
    sizes = QUICK if quick else DemoSizes()
    write_json(marker, {"quick": quick})
    started = time.monotonic()
    resources = find_resource_root()
    _write_inputs(output, sizes, seed)
    steps = DemoSteps(output)
    python = [sys.executable, "-m"]
    tiny_model = [f"--people={sizes.train_people}", f"--warm-up-steps={sizes.warm_up_steps}", f"--seed={seed}"]
    steps.run("tiny_model", [*python, "chatreid_plugin", "tiny-model", "tiny_model", *tiny_model])
    steps.run("build", [*python, "chatreid_plugin", "build", "build.yaml"])
    for stage in (1, 2, 3):
        recipe = os.path.relpath(resources / "examples" / f"stage{stage}.yaml", output)
        steps.run(f"stage{stage}", ["llamafactory-cli", "train", recipe, *list_training_overrides(stage, sizes, seed)])
    protocol = os.path.relpath(resources / "eval" / "market1501.yaml", output)
    evaluations = list_evaluations(sizes)
    for overrides in evaluations.values():
        steps.run(f"eval_{Path(overrides[-1]).name}", [*python, "chatreid_plugin.eval", protocol, *overrides])
    print_table(output, evaluations, time.monotonic() - started)


def print_table(output: Path, evaluations: dict[str, list[str]], seconds: float) -> None:
    """Print mAP and Rank-1 of every row in percent, and where the report is."""
    print(f"\n{'unseen identities':<32}{'mAP':>8}{'Rank-1':>8}")
    folder = output
    for name, overrides in evaluations.items():
        folder = output / overrides[-1].removeprefix("output.output_dir=")
        results = read_json(folder / "results.json")
        rows = {name: results["metrics"]}
        if name == "after Stage 3, filtered":
            rows = {"the filter alone": results["filter"]["baseline"]} | rows
        for row, metrics in rows.items():
            print(f"{row:<32}{100 * metrics['mAP']:>8.1f}{100 * metrics['Rank-1']:>8.1f}")
    print(f"\n{seconds / 60:.1f} minutes. Ranked galleries: {folder / 'report.html'}")

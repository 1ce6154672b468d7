"""Training on Stage 2 records: stock LLaMA-Factory (template ``qwen2_vl``, its own cache) against the plugin.

All arms get the same records, the paper's mix of the seven tasks: the plugin its compact Parquet with
``examples/stage2.yaml``, stock LLaMA-Factory, in a process with ``CHATREID_PLUGIN=0``, the same conversations as
ShareGPT files with the same keys. Between them each of three levers stands alone: ``batches`` of like length,
``logits`` for answers only, the ``loss`` by records. ``stock``, ``logits`` and ``loss`` have the same batches; the
first two have one loss. Every batch size trains as many records. Weights are random and are made on the device, from
the configuration alone. Time runs from the end of the warm-up to the end of the last step, optimizer and data loader
included; starting and the stock cache do not count. On a CPU it is that of the process, which other programs do not
change much.

MFU counts what the loss needs and nothing else: image patches and useful tokens through the layers, answer tokens
through the output layer, forward and backward; padding and recomputation (gradient checkpointing) are overhead.
``images/s a worker`` is what one loader worker reads: decoding, resizing, patches, tokens.
Run: OMP_NUM_THREADS=1 python tests/bench/bench_training.py [--batch 4 ...] [--size small|2b] [--device cuda]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench_engine import make_records
from model_work import (
    Work,
    describe_device,
    describe_use,
    describe_work,
    forget_peak_memory,
    measure_peak,
    print_header,
    print_row,
    read_peak_memory,
    write_model_files,
)
from PIL import Image

from chatreid_plugin.config import BuildSettings, load_settings
from chatreid_plugin.engine.build import build_datasets, name_dataset
from chatreid_plugin.engine.manifests import describe_origin, find_manifest
from chatreid_plugin.records import INSTRUCTION_SCHEMA, ImageRecord, convert_row_to_instruction
from chatreid_plugin.shards import read_shard, write_json, write_manifest
from chatreid_plugin.tasks import list_stage_tasks


REPOSITORY = Path(__file__).parents[2]
ARMS = ("stock", "batches", "logits", "loss", "plugin")
COLUMNS = ("code", "batch", "records", "records/s", "tokens/s", "useful tokens/s", "x stock", "padding", "images/s")
COLUMNS += ("images/s a worker", "MFU", "peak, GB", "loss")
# Records in the data set for each one of the largest batch: lengths are sorted within a quarter of them.
RECORDS_A_PLACE = 64
PEOPLE = 40
STOCK_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


@dataclass(frozen=True)
class Counts:
    """What a run trained on, without the warm-up; FLOPs are those of forward and backward."""

    records: int = 0
    tokens: int = 0
    useful: int = 0
    answers: int = 0
    images: int = 0
    flops: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def count_batch(work: Work, attention_mask: Any, labels: Any, grids: Any) -> Counts:
    """Return the counts of a batch.

    Args:
        work: the model's, a forward pass.
        attention_mask: [records, tokens], 0 where the batch is padded.
        labels: [records, tokens], -100 where nothing is learnt.
        grids: [images, 3], frames, rows and columns of patches of each image.
    """
    useful, answers = int(attention_mask.sum()), int((labels != -100).sum())
    patches: list[int] = grids.prod(dim=1).tolist()
    forward = sum(map(work.count_image, patches)) + useful * work.token + answers * work.answer
    return Counts(len(labels), labels.numel(), useful, answers, len(patches), 3 * forward)


@dataclass(frozen=True)
class Result:
    """One arm: what it trained on, seconds, mean loss of all steps, GB at the peak, images/s of a loader worker."""

    counts: Counts
    seconds: float
    loss: float
    memory: float
    reading: float


def write_images(folder: Path, records: list[ImageRecord]) -> None:
    """Write a JPEG crop with a coarse texture for each record."""
    rng = np.random.default_rng(0)
    for record in records:
        path = folder / record.path
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (16, 8, 3), dtype=np.uint8))
        coarse.resize((record.width, record.height), Image.Resampling.BICUBIC).save(path, quality=90)


def write_records(folder: Path, count: int) -> None:
    """Write crops, about ``count`` Stage 2 records, and the same records as ShareGPT files with the prefix stock_."""
    from chatreid_plugin.training.loader import convert_record

    recipe, images = folder / "recipe.yaml", folder / "images"
    source = {"name": "big", "parser": "market1501", "root": str(images)}
    paths = {"manifest_dir": str(folder / "manifests"), "output_dir": str(folder / "data")}
    recipe.write_text(yaml.safe_dump({"sources": [source], "records": {"stage2": count}} | paths))
    settings = load_settings(recipe, [], BuildSettings)
    manifest = make_records(PEOPLE)
    write_images(images, manifest)
    origin = describe_origin(settings.sources[0])
    write_manifest(find_manifest(settings, "big"), manifest, images, origin)
    build_datasets(settings)
    info = folder / "data" / "dataset_info.json"
    entries: dict[str, Any] = json.loads(info.read_text())
    for name in list(entries):
        shards = sorted((folder / "data" / entries[name]["file_name"]).glob("*.parquet"))
        rows = [row for shard in shards for row in read_shard(shard, INSTRUCTION_SCHEMA).to_pylist()]
        aligned = [convert_record(convert_row_to_instruction(row), str(images)) for row in rows]
        write_json(folder / "data" / f"stock_{name}.json", [make_stock_record(record) for record in aligned])
        columns = {"messages": "messages", "images": "images"}
        entries[f"stock_{name}"] = {
            "file_name": f"stock_{name}.json",
            "formatting": "sharegpt",
            "columns": columns,
            "tags": STOCK_TAGS,
        }
    write_json(info, entries)


def make_stock_record(aligned: dict[str, Any]) -> dict[str, Any]:
    """Return a record as stock LLaMA-Factory reads it: the conversation and the paths of its images."""
    return {
        "messages": [*aligned["_prompt"], *aligned["_response"]],
        "images": [image["path"] for image in aligned["_images"]],
    }


def list_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of Stage 2 for one process, with stock LLaMA-Factory's keys alone in its arm."""
    values: dict[str, Any] = yaml.safe_load((REPOSITORY / "examples" / "stage2.yaml").read_text())
    names = [name_dataset(task.name, 2) for task in list_stage_tasks(2)]  # what the recipe's chatreid_stage2 is
    values |= {
        "model_name_or_path": str(options.folder / "model"),
        "train_from_scratch": True,  # from the configuration: no weights are read
        "dataset_dir": str(options.folder / "data"),
        "output_dir": str(options.folder / f"{options.arm}_{options.batch[0]}"),
        "chatreid_encoder": None,
        "deepspeed": None,
        "per_device_train_batch_size": options.batch[0],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": options.checkpointing,
        "max_steps": options.warm_up + options.steps,
        "dataloader_num_workers": options.workers,
        "save_strategy": "no",
        "plot_loss": False,
    }
    if options.arm in ("logits", "loss"):
        values["train_sampling_strategy"] = "random"
    if options.arm == "loss":
        values["chatreid_loss"] = "records"
    if options.device == "cpu":
        values |= {"bf16": False, "use_cpu": True}
    if options.arm == "stock":
        values = {key: value for key, value in values.items() if not key.startswith("chatreid_")}
        values |= {"template": "qwen2_vl", "preprocessing_num_workers": options.workers or None}
        values |= {"train_sampling_strategy": "random"}
        names = [f"stock_{name}" for name in names]
    return values | {"dataset": ",".join(names)}


def make_trainer(arguments: dict[str, Any], device: str, arm: str) -> Any:
    """Return LLaMA-Factory's trainer of supervised fine-tuning, as its ``run_sft`` makes it, on the device.

    ``batches`` gets stock's loss, which no key asks for, and ``loss`` all logits.
    """
    import torch
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    model_args, data_args, training_args, finetuning_args, _ = get_train_args(arguments)
    if arm == "batches":
        finetuning_args.chatreid_loss = None
    loaded = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
    datasets = get_dataset(template, model_args, data_args, training_args, stage="sft", **loaded)
    with torch.device(device):
        model = load_model(loaded["tokenizer"], model_args, finetuning_args, is_trainable=True)
    collator = SFTDataCollatorWith4DAttentionMask(template=template, model=model, pad_to_multiple_of=8, **loaded)
    trainer = CustomSeq2SeqTrainer(
        model=model, args=training_args, finetuning_args=finetuning_args, data_collator=collator, **datasets, **loaded
    )
    if arm == "loss":
        model.get_output_embeddings()._forward_pre_hooks.clear()
    return trainer


def measure_reading(trainer: Any) -> float:
    """Return how many images a second one loader worker reads: this process, for a few records of all tasks."""
    dataset = trainer.train_dataset
    chosen = range(0, len(dataset), -(-len(dataset) // 24))
    start = time.process_time()
    batches = [trainer.data_collator([dataset[number]]) for number in chosen]
    return sum(len(batch["image_grid_thw"]) for batch in batches) / (time.process_time() - start)


class Meter:
    """Counts a trainer's batches and times its steps, without those of the warm-up."""

    def __init__(self, trainer: Any, warm_up: int, device: str) -> None:
        self.trainer, self.warm_up, self.device = trainer, warm_up, device
        self.batches: list[tuple[Any, Any, Any]] = []
        self.steps, self.start = 0, 0.0
        self._train: Callable[..., Any] = trainer.training_step
        trainer.training_step = self.train_step

    def train_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        """Train as the trainer does; the clock starts as the first step after the warm-up begins."""
        if self.steps == self.warm_up:
            forget_peak_memory()
            self.start = self.read_clock()
        self.steps += 1
        if self.steps > self.warm_up:
            # Kept as they are: to count now would wait for the device.
            self.batches.append((inputs["attention_mask"], inputs["labels"], inputs["image_grid_thw"]))
        return self._train(model, inputs, *rest)

    def read_clock(self) -> float:
        """Return the time when the device has done what it was asked; this process's own on a CPU."""
        if not self.device.startswith("cuda"):
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    def run(self) -> Result:
        """Train to the end."""
        reading = measure_reading(self.trainer)
        loss = self.trainer.train().training_loss
        seconds, memory = self.read_clock() - self.start, read_peak_memory(self.device)
        work = describe_work(self.trainer.model.config)
        counts = sum((count_batch(work, *batch) for batch in self.batches), Counts())
        return Result(counts, seconds, loss, memory, reading)


def run_arm(options: argparse.Namespace) -> None:
    """Train in this process and write the result for the one that asked."""
    if options.arm != "stock":
        from chatreid_plugin import _autoload

        _autoload.install()  # where no .pth file has done it
    trainer = make_trainer(list_arguments(options), options.device, options.arm)
    result = Meter(trainer, options.warm_up, options.device).run()
    write_json(options.folder / "result.json", asdict(result))


def ask_arm(arm: str, batch: int, folder: Path, arguments: list[str]) -> Result:
    """Train in a process of its own.

    Raises:
        SystemExit: it failed; the end of what it said.
    """
    log, result = folder / f"{arm}_{batch}.log", folder / "result.json"
    command = [sys.executable, __file__, *arguments, "--arm", arm, "--batch", str(batch), "--folder", str(folder)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    environment |= {"CHATREID_PLUGIN": "0"} if arm == "stock" else {}
    with log.open("wb") as output:
        code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{arm}, batch {batch} failed:\n{log.read_text(errors='replace')[-4000:]}")
    found = json.loads(result.read_text())
    return Result(Counts(**found.pop("counts")), **found)


def show(arm: str, batch: int, result: Result, stock: Result, peak: float | None) -> None:
    """Print a row of the table; the speed against stock's is that of useful tokens, since the records differ."""
    counts, seconds = result.counts, result.seconds
    print_row(
        arm,
        batch,
        counts.records,
        f"{counts.records / seconds:.2f}",
        f"{counts.tokens / seconds:,.0f}",
        f"{counts.useful / seconds:,.0f}",
        f"{counts.useful / seconds / (stock.counts.useful / stock.seconds):.2f}",
        f"{1 - counts.useful / counts.tokens:.0%}",
        f"{counts.images / seconds:.1f}",
        f"{result.reading:.0f}",
        describe_use(counts.flops, seconds, peak),
        f"{result.memory:.1f}",
        f"{result.loss:.4f}",
    )


def parse_options(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and those that the processes of the arms take over."""
    shared = argparse.ArgumentParser(description=__doc__)
    shared.add_argument("--batch", type=int, nargs="+", default=[4])
    shared.add_argument("--arms", choices=ARMS, nargs="+", default=ARMS, help="stock is always among them")
    shared.add_argument("--arm", choices=ARMS, help="run this one in this process; for the script itself")
    shared.add_argument("--folder", type=Path, help="write here and keep it")
    options, rest = shared.parse_known_args(arguments)
    own = argparse.ArgumentParser()
    own.add_argument("--device", default="cpu")
    own.add_argument("--size", choices=["tiny", "small", "2b"], default="tiny")
    own.add_argument("--steps", type=int, default=20, help="of the largest batch; others train as many records")
    own.add_argument("--warm-up", type=int, default=3)
    own.add_argument("--workers", type=int, default=4, help="0 on a CPU, whose time is this process's")
    own.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    options = own.parse_args(rest, options)
    if options.device == "cpu":
        options.workers = 0
    return options, rest


def main() -> None:
    """Print the table, a row as each arm ends."""
    options, rest = parse_options()
    if options.arm:
        run_arm(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_model_files(folder / "model", options.size)
        largest = max(options.batch)
        write_records(folder, largest * max(options.warm_up + options.steps, RECORDS_A_PLACE))
        peak = measure_peak(options.device)
        print(describe_device(options.device, peak), f"{options.size}, gradient checkpointing ", sep=", ", end="")
        print("on" if options.checkpointing else "off", f"{options.steps} steps\n", sep=", ", flush=True)
        print_header(*COLUMNS)
        for batch in options.batch:
            steps = ["--steps", str(options.steps * largest // batch)]
            results: dict[str, Result] = {}
            for arm in dict.fromkeys(["stock", *options.arms]):
                results[arm] = ask_arm(arm, batch, folder, [*rest, *steps])
                show(arm, batch, results[arm], results["stock"], peak)


if __name__ == "__main__":
    main()

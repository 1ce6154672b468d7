"""Pairs a second: ``generate()`` a pair, batches of whole questions, the fast path.

Queries share their candidates, as a gallery's images do: on Market-1501 with 100 candidates a query each image is
asked about 21 times. Random weights; every path is given the crops' files, so decoding and the vision tower count in
all of them. Rows are printed as they come, as a Markdown table.
Run: OMP_NUM_THREADS=1 python tests/bench/bench_scoring.py [--queries 8] [--candidates 100] [--naive-candidates N]
[--device cuda --dtype bfloat16 --size 2b]
"""

import argparse
import gc
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from transformers import Qwen2VLForConditionalGeneration

from chatreid_plugin.datasets.benchmark import Query, make_image_query
from chatreid_plugin.eval.backends.checkpoint import load_checkpoint
from chatreid_plugin.eval.backends.decoder import Tokenizer
from chatreid_plugin.eval.backends.transformers import TransformersScorer
from chatreid_plugin.eval.questions import IMAGE_PAIR, build_pair_prompt
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.tasks import SYSTEM_PROMPT, format_chat_prompt
from tests.support import make_eval_settings


NAIVE, WHOLE, FAST = "generate(), a pair", "whole questions", "fast path"
COLUMNS = ("queries", "path", "pairs", "pairs/s", "wall", "process time", "MFU", "peak, GB", "largest difference")


def count_flops(
    work: Work, path: str, *, queries: int, candidates: int, patches: int, question: int, prefix: int
) -> float:
    """Return the FLOPs that a path takes for all pairs of queries and candidates.

    Args:
        work: the model's.
        path: ``generate(), a pair`` encodes both images of every pair, the others each image once; ``fast path``
            decodes what stands before the candidate once a query, the others in every pair.
        queries: how many.
        candidates: how many, the same for each query.
        patches: of an image.
        question: tokens of a question, the two images' included.
        prefix: how many of them stand before the candidate's.
    """
    pairs = queries * candidates
    images = 2 * pairs if path == NAIVE else queries + candidates
    tokens = queries * prefix + pairs * (question - prefix) if path == FAST else pairs * question
    return images * work.count_image(patches) + tokens * work.token


@dataclass(frozen=True)
class Question:
    """Lengths of a question on two crops: patches of each, tokens, and how many stand before the second crop."""

    patches: int
    tokens: int
    prefix: int


def count_question(model: Any, processor: Any, root: Path, query: Query) -> Question:
    """Return the lengths of a question on two images like the query's."""
    assert query.image is not None
    picture = Image.open(root / query.image.path)
    patches = processor.image_processor(images=[picture], return_tensors="pt")["image_grid_thw"][0].tolist()
    tokenizer = Tokenizer(model, processor, SYSTEM_PROMPT)
    tokens = tokenizer.encode(build_pair_prompt(query, IMAGE_PAIR), [tuple(patches)] * 2)
    return Question(math.prod(patches), len(tokens.ids), tokens.find_image(1))


def write_model(folder: Path, size: str, device: str, dtype: str) -> Any:
    """Write a checkpoint with random weights, made on the device; return its configuration."""
    config = write_model_files(folder, size)
    if size != "tiny":
        make: Any = Qwen2VLForConditionalGeneration
        with torch.device(device):
            make._from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return config


def write_crops(folder: Path, count: int) -> list[ImageRecord]:
    """Write crops of 128x256 pixels."""
    rng = np.random.default_rng(0)
    records: list[ImageRecord] = []
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (256, 128, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        records.append(ImageRecord(str(index), "t", "gallery", f"{index}.png", f"t:{index}", "1", 128, 256))
    return records


def generate_each(model: Any, processor: Any, root: Path, query: Query, candidates: list[ImageRecord]) -> list[float]:
    """Ask a pair at a time with ``generate`` of the model as transformers loads it; return margins."""
    marks = "<|vision_start|><|image_pad|><|vision_end|>"
    text = format_chat_prompt(marks.join(build_pair_prompt(query, IMAGE_PAIR).segments))
    yes, no = (processor.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    margins: list[float] = []
    for candidate in candidates:
        images = [Image.open(root / f"{record.path}") for record in (query.image, candidate) if record is not None]
        inputs = processor(text=[text], images=images, return_tensors="pt").to(model.device)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
        options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        logits = model.generate(**inputs, **options).logits[0][0].float()
        margins.append(float(logits[yes] - logits[no]))
    return margins


@torch.inference_mode()
def score_whole(scorer: TransformersScorer, query: Query, candidates: list[ImageRecord]) -> list[float]:
    """Score with stored features, but the whole question for every pair."""
    scorer.prepare([query], candidates)
    assert query.image is not None
    own = scorer.features[query.image.image_id]
    tokens = scorer._tokenizer.encode(build_pair_prompt(query, IMAGE_PAIR), [own.grid, own.grid])
    rows = [[own.levels, scorer.features[record.image_id].levels] for record in candidates]
    parts = scorer._batcher.run(
        lambda part: scorer._decoder.compute_last(tokens, part) @ scorer._direction.T, rows, cost=1
    )
    return torch.cat(parts)[:, 0].tolist()


@dataclass(frozen=True)
class Measured:
    """Wall and CPU seconds of a path, margins (Q, K), GB at the peak."""

    wall: float
    own: float
    margins: Any
    memory: float


def measure(ask: Callable[[], Any], device: str) -> Measured:
    """Return what a path takes; it reads its margins back on the CPU, so that the device has finished."""
    forget_peak_memory()
    wall, own = time.perf_counter(), time.process_time()
    margins = ask()
    return Measured(time.perf_counter() - wall, time.process_time() - own, np.array(margins), read_peak_memory(device))


def ask_naively(
    settings: EvalSettings, root: Path, queries: list[Query], candidates: list[ImageRecord]
) -> tuple[Measured, Question]:
    """Ask every pair of the stock model, which is gone from the device afterwards; return a question's lengths too."""
    loaded = load_checkpoint(settings.model)
    model, processor = loaded.model, loaded.processor
    question = count_question(model, processor, root, queries[0])
    generate_each(model, processor, root, queries[0], candidates[:2])
    found = measure(
        lambda: [generate_each(model, processor, root, query, candidates) for query in queries], settings.model.device
    )
    return found, question


def ask_path(scorer: TransformersScorer, path: str, queries: list[Query], candidates: list[ImageRecord]) -> Measured:
    """Ask every pair, nothing encoded before."""

    def ask() -> list[Any]:
        if path == WHOLE:
            return [score_whole(scorer, query, candidates) for query in queries]
        scorer.prepare(queries, candidates)
        return [scorer.score_pairs(query, candidates, IMAGE_PAIR) for query in queries]

    score_whole(scorer, queries[0], candidates[:2])
    scorer.score_pairs(queries[0], candidates[:2], IMAGE_PAIR)
    scorer.forget_images()
    return measure(ask, scorer.model.device.type)


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    """Print a row for each path."""
    work = describe_work(write_model(folder, arguments.size, arguments.device, arguments.dtype))
    crops = write_crops(folder, arguments.queries + arguments.candidates)
    queries = [make_image_query(record) for record in crops[: arguments.queries]]
    candidates = crops[arguments.queries :]
    few = candidates[: arguments.naive_candidates]
    values = {"protocol": "folder", "manifest": "m.parquet", "output_dir": folder, "model_name_or_path": folder}
    values |= {"device": arguments.device, "dtype": arguments.dtype, "chatreid_stage": None}
    settings = make_eval_settings({key: str(value) if value else value for key, value in values.items()})
    peak = measure_peak(arguments.device)
    print(describe_device(arguments.device, peak), f"{arguments.dtype}, {arguments.size}\n", sep=", ", flush=True)
    print_header(*COLUMNS)
    naive, question = ask_naively(settings, folder, queries, few)
    gc.collect()
    lengths = {"patches": question.patches, "question": question.tokens, "prefix": question.prefix}

    def show(path: str, asked: list[ImageRecord], found: Measured) -> None:
        pairs, share = len(queries) * len(asked), len(asked) / len(few)
        flops = count_flops(work, path, queries=len(queries), candidates=len(asked), **lengths)
        print_row(
            len(queries),
            path,
            pairs,
            f"{pairs / found.wall:,.1f}",
            f"{share * naive.wall / found.wall:.1f}",
            f"{share * naive.own / found.own:.1f}",
            describe_use(flops, found.wall, peak),
            f"{found.memory:.2f}",
            f"{np.abs(found.margins[:, : len(few)] - naive.margins).max():.1e}",
        )

    show(NAIVE, few, naive)
    scorer = TransformersScorer(settings.model, folder)
    for path in (WHOLE, FAST):
        show(path, candidates, ask_path(scorer, path, queries, candidates))
    print(f"\n{question.tokens} tokens a question, {question.prefix} of them before the candidate", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--naive-candidates", type=int, help="how many of them generate() is asked about; default all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", choices=["tiny", "2b"], default="tiny")
    with tempfile.TemporaryDirectory() as name:
        compare(Path(name), parser.parse_args())


if __name__ == "__main__":
    main()

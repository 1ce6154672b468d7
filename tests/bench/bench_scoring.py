"""Pairs a second: ``generate()`` a pair, batches of whole questions, the fast path.

Queries share their candidates, as a gallery's images do: on Market-1501 with 100 candidates a query each image is
asked about 21 times. Random weights; every path is given the crops' files, so decoding and the vision tower count in
all of them.
Run: OMP_NUM_THREADS=1 python tests/bench/bench_scoring.py [--queries 8] [--candidates 100]
[--device cuda --dtype bfloat16 --size 2b]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from chatreid_plugin.demo.people import sample_people
from chatreid_plugin.demo.tiny_model import write_tiny_model
from chatreid_plugin.eval.backends.checkpoint import load_checkpoint
from chatreid_plugin.eval.backends.transformers import TransformersScorer
from chatreid_plugin.eval.prompts import IMAGE_PAIR, build_pair_prompt
from chatreid_plugin.eval.queries import Query, make_image_query
from chatreid_plugin.eval_settings import EvalSettings
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.tasks import format_chat_prompt


# Qwen2-VL-2B: FLOPs of a 256x128 image (180 patches) in the vision tower, and of a token in the decoder, without its
# attention, which is about 1 % at these lengths; FLOPs a second of an H200 in practice, dense bf16.
IMAGE_FLOPS, TOKEN_FLOPS, PEAK_FLOPS = 235e9, 2.62e9, 790e12
TEXT_2B = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
TEXT_2B |= {"num_key_value_heads": 2, "vocab_size": 151936}


def count_flops(path: str, queries: int, candidates: int, question: int, prefix: int) -> float:
    """Return the FLOPs that a path takes of a 2B model for all pairs of queries and candidates.

    Args:
        path: ``generate, a pair`` encodes both images of every pair, the others each image once; ``fast path`` decodes
            what stands before the candidate once a query, the others in every pair.
        queries: how many.
        candidates: how many, the same for each query.
        question: tokens of a question, the two images' included.
        prefix: how many of them stand before the candidate's.
    """
    pairs = queries * candidates
    images = 2 * pairs if path == "generate, a pair" else queries + candidates
    tokens = queries * prefix + pairs * (question - prefix) if path == "fast path" else pairs * question
    return images * IMAGE_FLOPS + tokens * TOKEN_FLOPS


def count_tokens(scorer: TransformersScorer, query: Query) -> tuple[int, int]:
    """Return the tokens of a question on two images like the query's, and how many stand before the second image."""
    assert query.image is not None
    grid = scorer.features[query.image.image_id].grid
    tokens = scorer._tokenizer.encode(build_pair_prompt(query, IMAGE_PAIR), [grid, grid])
    return len(tokens.ids), tokens.find_image(1)


def write_model(folder: Path, size: str, dtype: str) -> None:
    """Write a checkpoint with random weights."""
    write_tiny_model(folder, sample_people(20, 0))
    if size == "tiny":
        return
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    config: Any = Qwen2VLConfig.from_pretrained(folder)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    values = config.text_config.to_dict() | TEXT_2B | {"rope_parameters": rope, "layer_types": None}
    tokens = {name: getattr(config, name) for name in ("image_token_id", "video_token_id")}
    tokens |= {name: getattr(config, name) for name in ("vision_start_token_id", "vision_end_token_id")}
    make: Any = Qwen2VLConfig
    made = make(text_config=values, vision_config={"hidden_size": 1536}, tie_word_embeddings=True, **tokens)
    Qwen2VLForConditionalGeneration(made).to(getattr(torch, dtype)).save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=14).save_pretrained(folder)


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


def measure(
    scorer: TransformersScorer, path: str, run: Callable[..., Any], queries: list[Query], candidates: list[ImageRecord]
) -> tuple[float, float, Any]:
    """Return wall and CPU seconds and the margins (Q, K), nothing encoded before."""
    scorer.forget_images()
    wall, own = time.perf_counter(), time.process_time()
    if path == "fast path":
        scorer.prepare(queries, candidates)
    margins = [run(query, candidates) for query in queries]  # read back on the CPU: the device has finished
    return time.perf_counter() - wall, time.process_time() - own, margins


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", choices=["tiny", "2b"], default="tiny")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, arguments.size, arguments.dtype)
        crops = write_crops(folder, arguments.queries + arguments.candidates)
        queries = [make_image_query(record) for record in crops[: arguments.queries]]
        candidates = crops[arguments.queries :]
        values = {"protocol": "folder", "manifest": "m.parquet", "output_dir": name, "model_name_or_path": name}
        values |= {"device": arguments.device, "dtype": arguments.dtype, "chatreid_stage": None}
        settings = EvalSettings.model_validate(values)
        scorer, stock = TransformersScorer(settings, folder), load_checkpoint(settings)
        paths: dict[str, Callable[[Query, list[ImageRecord]], Any]] = {
            "generate, a pair": lambda query, gallery: generate_each(*stock, folder, query, gallery),
            "whole questions": lambda query, gallery: score_whole(scorer, query, gallery),
            "fast path": lambda query, gallery: scorer.score_pairs(query, gallery, IMAGE_PAIR),
        }
        for run in paths.values():
            run(queries[0], candidates[:2])
        found = {path: measure(scorer, path, run, queries, candidates) for path, run in paths.items()}
        question, prefix = count_tokens(scorer, queries[0])
    print(f"{question} tokens a question, {prefix} of them before the candidate")
    naive = found["generate, a pair"]
    for path, (wall, own, margins) in found.items():
        difference = np.abs(np.array(margins) - naive[2]).max()
        rate = len(queries) * len(candidates) / wall
        print(f"{path:17} {rate:8.1f} pairs/s  wall x{naive[0] / wall:.1f}  process x{naive[1] / own:.1f}", end="")
        print(f"  largest difference {difference:.1e}", end="")
        flops = count_flops(path, len(queries), len(candidates), question, prefix)
        print(f"  MFU {flops / wall / PEAK_FLOPS:.1%}" if arguments.size == "2b" else "")


if __name__ == "__main__":
    main()

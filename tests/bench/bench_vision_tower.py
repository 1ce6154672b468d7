"""How long a vision tower of Qwen2-VL-2B's width takes on a batch of crops: one attention call per image, or per size.

Weights are random, a few layers stand for the 32. Run: OMP_NUM_THREADS=1 python tests/bench/bench_vision_tower.py
[--crops N] [--layers N] [--repeats N] [--attention sdpa|eager] [--device cuda] [--dtype bfloat16]
"""

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AttentionInterface, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from chatreid_plugin.vision_tower import speed_up_vision_tower


# Rows and columns of patches of 14 pixels in crops of 256x128, 224x112 and 196x84, rounded to 28 as Qwen2-VL does.
SIZES = ((18, 10), (16, 8), (14, 6))
CALLS = {"number": 0}


def make_model(layers: int, attention: str) -> Any:
    """Return a Qwen2-VL whose tower has 2B's width (1280, 16 heads) and whose language part is as small as can be."""
    text = {"vocab_size": 64, "hidden_size": 1536, "intermediate_size": 8, "num_hidden_layers": 1}
    config: Any = Qwen2VLConfig
    made = config(text_config=text, vision_config={"depth": layers, "hidden_size": 1536})
    torch.manual_seed(0)
    model: Any = Qwen2VLForConditionalGeneration
    return model._from_config(made, attn_implementation=attention)


def count_calls(attention: str) -> None:
    """Count the calls of the stock attention from now on."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    stock = AttentionInterface().get(attention, modeling_qwen2_vl.eager_attention_forward)

    def attend(*states: Any, **options: Any) -> Any:
        CALLS["number"] += 1
        return stock(*states, **options)

    AttentionInterface.register(attention, attend)


def run(tower: Any, patches: torch.Tensor, grid: torch.Tensor, backward: bool) -> tuple[float, torch.Tensor]:
    """Return seconds of a pass, and its output or, with ``backward``, the gradient of the first layer's QKV."""
    tower.zero_grad()
    # On a CPU its own time: other work on the machine would drown the difference.
    clock = time.perf_counter if patches.is_cuda else time.process_time
    start = clock()
    with torch.set_grad_enabled(backward):
        output = tower(patches, grid_thw=grid).pooler_output
        if backward:
            output.float().square().mean().backward()
            output = tower.blocks[0].attn.qkv.weight.grad
    if output.is_cuda:
        torch.cuda.synchronize()
    return clock() - start, output.detach().clone()


def compare(towers: dict[str, Any], name: str, grid: torch.Tensor, backward: bool, repeats: int) -> None:
    """Print medians of both towers, run in turn, their ratio, the calls of a pass and the largest difference."""
    weight = towers["stock"].patch_embed.proj.weight
    patches = torch.randn(int(grid.prod(dim=1).sum()), 3 * 2 * 14 * 14, device=weight.device, dtype=weight.dtype)
    grid = grid.to(weight.device)
    seconds: dict[str, list[float]] = {kind: [] for kind in towers}
    calls: dict[str, int] = {}
    results: dict[str, torch.Tensor] = {}
    for repeat in range(repeats + 1):
        for kind, tower in towers.items():
            CALLS["number"] = 0
            elapsed, results[kind] = run(tower, patches, grid, backward)
            calls[kind] = CALLS["number"]
            if repeat:  # the first warms up
                seconds[kind].append(elapsed)
    stock, ours = (statistics.median(seconds[kind]) for kind in ("stock", "ours"))
    difference = float((results["stock"] - results["ours"]).abs().max() / results["stock"].abs().max())
    passes = "forward+backward" if backward else "forward"
    print(
        f"{name:9} {passes:16}: stock {stock:7.3f} s, {calls['stock']:5} calls; "
        f"ours {ours:7.3f} s, {calls['ours']:3} calls; ratio {stock / ours:.2f}; relative difference {difference:.1e}"
    )


def main() -> None:
    """Print one line for equal and mixed sizes, forward and forward+backward."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crops", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    models = {kind: make_model(arguments.layers, arguments.attention) for kind in ("stock", "ours")}
    count_calls(arguments.attention)
    speed_up_vision_tower(models["ours"])
    dtype = getattr(torch, arguments.dtype)
    towers = {kind: model.model.visual.to(arguments.device, dtype) for kind, model in models.items()}
    grids = {
        "one size": [(1, *SIZES[0])] * arguments.crops,
        "3 sizes": [(1, *SIZES[number % len(SIZES)]) for number in range(arguments.crops)],
    }
    print(f"{arguments}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for name, grid in grids.items():
        for backward in (False, True):
            compare(towers, name, torch.tensor(grid), backward, arguments.repeats)


if __name__ == "__main__":
    main()

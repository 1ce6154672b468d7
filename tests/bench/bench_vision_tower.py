"""How long a vision tower of Qwen2-VL-2B's width takes on a batch of crops: one attention call per image, or per size.

Weights are random, a few layers stand for the 32 unless ``--layers 32``. Prints a Markdown table, rows as they come.
Run: OMP_NUM_THREADS=1 python tests/bench/bench_vision_tower.py
[--crops N ...] [--layers N] [--repeats N] [--attention sdpa|eager] [--device cuda] [--dtype bfloat16]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from model_work import (
    describe_device,
    describe_use,
    describe_work,
    forget_peak_memory,
    measure_peak,
    print_header,
    print_row,
    read_peak_memory,
)
from transformers import AttentionInterface, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from chatreid_plugin.vision_tower import speed_up_vision_tower


# Rows and columns of patches of 14 pixels in crops of 256x128, 224x112 and 196x84, rounded to 28 as Qwen2-VL does.
SIZES = ((18, 10), (16, 8), (14, 6))
CALLS = {"number": 0}
COLUMNS = ("crops", "sizes", "pass", "code", "calls", "s", "crops/s", "MFU", "peak, GB", "stock / ours", "difference")


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


@dataclass(frozen=True)
class Measured:
    """Seconds of the passes of a tower, calls of its attention and GB at the peak of one, and what it gave."""

    seconds: list[float]
    calls: int
    memory: float
    output: torch.Tensor


def measure(tower: Any, patches: torch.Tensor, grid: torch.Tensor, backward: bool, seconds: list[float]) -> Measured:
    """Run a pass and add its seconds to those of the passes before."""
    CALLS["number"] = 0
    forget_peak_memory()
    elapsed, output = run(tower, patches, grid, backward)
    return Measured([*seconds, elapsed], CALLS["number"], read_peak_memory(patches.device.type), output)


def compare(towers: dict[str, Any], grid: torch.Tensor, backward: bool, repeats: int) -> dict[str, Measured]:
    """Run both towers in turn; the first pass of each warms up and does not count."""
    weight = towers["stock"].patch_embed.proj.weight
    patches = torch.randn(int(grid.prod(dim=1).sum()), 3 * 2 * 14 * 14, device=weight.device, dtype=weight.dtype)
    grid = grid.to(weight.device)
    found: dict[str, Measured] = {}
    for repeat in range(repeats + 1):
        for kind, tower in towers.items():
            found[kind] = measure(tower, patches, grid, backward, found[kind].seconds if repeat > 1 else [])
    return found


def show(
    sizes: str, grid: torch.Tensor, backward: bool, found: dict[str, Measured], describe: Callable[..., str]
) -> None:
    """Print a row for each tower; ``describe`` gives the use of the card for patches, passes and seconds."""
    stock, ours = found["stock"].output, found["ours"].output
    medians = {kind: statistics.median(one.seconds) for kind, one in found.items()}
    ratio, difference = medians["stock"] / medians["ours"], (stock - ours).abs().max() / stock.abs().max()
    for kind, one in found.items():
        print_row(
            len(grid),
            sizes,
            "forward+backward" if backward else "forward",
            kind,
            one.calls,
            f"{medians[kind]:.3f}",
            f"{len(grid) / medians[kind]:.1f}",
            describe(grid.prod(dim=1).tolist(), 3 if backward else 1, medians[kind]),
            f"{one.memory:.2f}",
            *((f"{ratio:.2f}", f"{float(difference):.1e}") if kind == "ours" else ("", "")),
        )


def main() -> None:
    """Print rows for equal and mixed sizes, forward and forward+backward."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crops", type=int, nargs="+", default=[64])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    models = {kind: make_model(arguments.layers, arguments.attention) for kind in ("stock", "ours")}
    work = describe_work(models["ours"].config)
    count_calls(arguments.attention)
    speed_up_vision_tower(models["ours"])
    dtype = getattr(torch, arguments.dtype)
    towers = {kind: model.model.visual.to(arguments.device, dtype) for kind, model in models.items()}
    peak = measure_peak(arguments.device)
    print(describe_device(arguments.device, peak), f"{arguments.dtype}, {arguments.attention}", sep=", ", end=", ")
    print(f"{arguments.layers} layers, {torch.get_num_threads()} thread(s)\n", flush=True)
    print_header(*COLUMNS)

    def describe(patches: list[int], passes: int, seconds: float) -> str:
        return describe_use(passes * sum(map(work.count_image, patches)), seconds, peak)

    for crops in arguments.crops:
        grids = {
            "one": [(1, *SIZES[0])] * crops,
            "three": [(1, *SIZES[number % len(SIZES)]) for number in range(crops)],
        }
        for sizes, grid in grids.items():
            for backward in (False, True):
                found = compare(towers, torch.tensor(grid), backward, arguments.repeats)
                show(sizes, torch.tensor(grid), backward, found, describe)


if __name__ == "__main__":
    main()

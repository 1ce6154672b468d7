"""What the GPU benchmarks share: Qwen2-VL-2B's shapes, the FLOPs of them, a card's own limit and its peak memory.

Multiplications and additions of the matrix products count, two FLOPs a pair; norms, softmax, rotations and the
decoder's attention (below 1 % of it at a few hundred tokens) do not. A use (MFU) is a share of the FLOP/s that the
card itself reaches on one large matrix product: the figures of data sheets are out of reach of every program.
"""

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


# config.json of Qwen2-VL-2B-Instruct; Qwen2VLConfig's own defaults are the vision tower of every size.
TEXT_2B: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "head_dim": 128,
}
ROPE_2B = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


# The same with every width divided by 16, the number of words too: each part keeps its share of the work.
TEXT_SMALL: dict[str, Any] = TEXT_2B | {"hidden_size": 96, "intermediate_size": 560, "vocab_size": 9496, "head_dim": 8}
ROPE_SMALL = ROPE_2B | {"mrope_section": [2, 1, 1]}
VISION_SMALL = {"embed_dim": 80, "num_heads": 4}


@dataclass(frozen=True)
class Work:
    """FLOPs of a forward pass, part by part; a backward pass takes twice as many.

    Attributes:
        patch: of a patch in the vision tower and the merger, without its attention.
        attention: of a patch in the tower's attention, for each patch of its image.
        token: of a token in the decoder's layers.
        answer: of a token in the output layer.
    """

    patch: float
    attention: float
    token: float
    answer: float

    def count_image(self, patches: int) -> float:
        """Return the FLOPs of an image of so many patches."""
        return patches * (self.patch + self.attention * patches)


def describe_work(config: Any) -> Work:
    """Return the FLOPs of a Qwen2-VL configuration."""
    vision, text = config.vision_config, config.text_config
    width, merged = vision.embed_dim, vision.embed_dim * vision.spatial_merge_size**2
    layer = 4 * width**2 + 2 * width * int(width * vision.mlp_ratio)
    pixels = 3 * vision.temporal_patch_size * vision.patch_size**2
    merger = merged * (merged + vision.hidden_size) / vision.spatial_merge_size**2
    hidden, kept = text.hidden_size, text.num_key_value_heads / text.num_attention_heads
    decoder = 2 * (1 + kept) * hidden**2 + 3 * hidden * text.intermediate_size
    return Work(
        patch=2 * (vision.depth * layer + pixels * width + merger),
        attention=4.0 * vision.depth * width,
        token=2 * text.num_hidden_layers * decoder,
        answer=2.0 * hidden * text.vocab_size,
    )


def make_2b_config(tiny: Any, small: bool = False) -> Any:
    """Return a configuration of Qwen2-VL-2B's shapes, or the small ones, with the token numbers of a tiny model's."""
    from transformers import Qwen2VLConfig

    shapes, rope = (TEXT_SMALL, ROPE_SMALL) if small else (TEXT_2B, ROPE_2B)
    text = tiny.text_config.to_dict() | shapes | {"rope_parameters": rope, "layer_types": None}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    make: Any = Qwen2VLConfig
    return make(
        text_config=text,
        vision_config={"hidden_size": text["hidden_size"]} | (VISION_SMALL if small else {}),
        tie_word_embeddings=True,
        **{name: getattr(tiny, name) for name in names},
    )


def write_model_files(folder: Path, size: str, seed: int = 0) -> Any:
    """Write tokenizer, processor and configuration, with ``tiny`` weights as well; return the configuration."""
    from transformers import Qwen2VLConfig

    from chatreid_plugin.demo.people import sample_people
    from chatreid_plugin.demo.tiny_model import TinySizes, write_tiny_model

    write_tiny_model(folder, sample_people(20, 0), sizes=TinySizes(patch_size=16 if size == "tiny" else 14), seed=seed)
    config: Any = Qwen2VLConfig.from_pretrained(folder)
    if size == "tiny":
        return config
    (folder / "model.safetensors").unlink()
    config = make_2b_config(config, small=size == "small")
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    config.save_pretrained(folder)
    return config


def measure_peak(device: str, size: int = 8192) -> float | None:
    """Return the FLOP/s of a bf16 matrix product of random numbers on a GPU; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        left @ right
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def describe_use(flops: float, seconds: float, peak: float | None) -> str:
    """Return the share of ``peak`` in percent, or a dash where there is none.

    >>> describe_use(flops=100e12, seconds=2, peak=200e12)
    '25.0 %'
    """
    return "-" if peak is None else f"{flops / seconds / peak:.1%}".replace("%", " %")


def forget_peak_memory() -> None:
    """Count the GPU's peak memory from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def read_peak_memory(device: str) -> float:
    """Return GB: the GPU's peak of tensors since ``forget_peak_memory``; the process's own on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def describe_device(device: str, peak: float | None) -> str:
    """Return a line for above a table: the card and its limit, and the versions."""
    import transformers

    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    limit = "" if peak is None else f" ({peak / 1e12:.0f} TFLOP/s on a matrix product in bf16)"
    return f"{name}{limit}, torch {torch.__version__}, transformers {transformers.__version__}"


def print_row(*cells: object) -> None:
    """Print a row of a Markdown table at once, so that a run that is cut off keeps it."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_header(*cells: str) -> None:
    """Print the head of a Markdown table."""
    print_row(*cells)
    print("|" + "---|" * len(cells), flush=True)

"""Image-size policies of the three stages and the visual tokens they cost: pure arithmetic on (width, height).

The order of operations is the one of training: stage policy (paper section 3.3), then LLaMA-Factory's
``image_max_pixels`` / ``image_min_pixels`` and edge rules, then the processor's rounding to whole patches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError


Aspect = Literal["stretch", "keep"]

# Paper section 3.3; the paper gives height x width, these are (width, height).
STAGE1_SIZE = (128, 256)
STAGE2_SIZE = (192, 384)

# LLaMA-Factory 0.9.5: hparams/model_args.py defaults, and the limits in data/mm_plugin.py (Qwen2VLPlugin).
DEFAULT_IMAGE_MAX_PIXELS = 768 * 768
DEFAULT_IMAGE_MIN_PIXELS = 32 * 32
SMALLEST_EDGE = 28
LARGEST_ASPECT_RATIO = 200
CLIPPED_ASPECT_RATIO = 180


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """What happens to a crop before the model sees it; the same object serves training and evaluation.

    Attributes:
        stage: 1, 2, 3, or None for no stage policy.
        aspect: ``stretch`` gives exactly the paper's size, ``keep`` its area with the crop's own aspect ratio.
        image_max_pixels: LLaMA-Factory's key, an area in pixels.
        image_min_pixels: LLaMA-Factory's key, an area in pixels.
    """

    stage: int | None = None
    aspect: Aspect = "stretch"
    image_max_pixels: int = DEFAULT_IMAGE_MAX_PIXELS
    image_min_pixels: int = DEFAULT_IMAGE_MIN_PIXELS

    def __post_init__(self) -> None:
        if self.stage not in (None, 1, 2, 3):
            raise ConfigError(f"chatreid_stage must be 1, 2 or 3, not {self.stage!r}.")
        if self.aspect not in ("stretch", "keep"):
            raise ConfigError(f"chatreid_aspect must be stretch or keep, not {self.aspect!r}.")


@dataclass(frozen=True, slots=True)
class PatchGeometry:
    """The processor's numbers that turn pixels into tokens; the defaults are Qwen2-VL's preprocessor_config.json."""

    patch_size: int = 14
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280


def read_geometry(image_processor: Any) -> PatchGeometry:
    """Return the numbers of a Qwen-VL image processor that decide the token count."""
    size: Any = image_processor.size  # a dict or a SizeDict, both of which have these keys
    return PatchGeometry(
        image_processor.patch_size, image_processor.merge_size, size["shortest_edge"], size["longest_edge"]
    )


def _scale_to_area(width: int, height: int, area: int) -> tuple[int, int]:
    factor = math.sqrt(area / (width * height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def apply_stage_policy(width: int, height: int, stage: int | None, aspect: Aspect = "stretch") -> tuple[int, int]:
    """Return the size in pixels that the stage gives a crop of this size.

    Stage 1: below 256x128 (height x width, compared by area) becomes 256x128, else unchanged.
    Stage 2: above 384x192 becomes 384x192, else unchanged. Stage 3: unchanged (paper section 3.3).
    """
    area = width * height
    if stage == 1 and area < STAGE1_SIZE[0] * STAGE1_SIZE[1]:
        target = STAGE1_SIZE
    elif stage == 2 and area > STAGE2_SIZE[0] * STAGE2_SIZE[1]:
        target = STAGE2_SIZE
    else:
        return width, height
    return target if aspect == "stretch" else _scale_to_area(width, height, target[0] * target[1])


def _list_limited_sizes(width: int, height: int, max_pixels: int, min_pixels: int) -> Iterator[tuple[int, int]]:
    """Yield the sizes after LLaMA-Factory's pixel limits and Qwen2-VL's edge rules (data/mm_plugin.py, 0.9.5)."""
    if width * height > max_pixels:
        factor = math.sqrt(max_pixels / (width * height))
        width, height = int(width * factor), int(height * factor)
        yield width, height
    if width * height < min_pixels:
        factor = math.sqrt(min_pixels / (width * height))
        width, height = int(width * factor), int(height * factor)
        yield width, height
    if min(width, height) < SMALLEST_EDGE:
        width, height = max(width, SMALLEST_EDGE), max(height, SMALLEST_EDGE)
        yield width, height
    if width / height > LARGEST_ASPECT_RATIO:
        width = height * CLIPPED_ASPECT_RATIO
        yield width, height
    if height / width > LARGEST_ASPECT_RATIO:
        height = width * CLIPPED_ASPECT_RATIO
        yield width, height


def list_resizes(width: int, height: int, policy: ImagePolicy) -> list[tuple[int, int]]:
    """Return every size an image of this native size is resized to, one after another, as in training.

    Pixels depend on the steps, not on the last size alone: with Stage 1 and a small ``image_max_pixels`` a crop is
    first enlarged and then reduced.
    """
    staged = apply_stage_policy(width, height, policy.stage, policy.aspect)
    first = [staged] if staged != (width, height) else []
    return [*first, *_list_limited_sizes(*staged, policy.image_max_pixels, policy.image_min_pixels)]


def resize_by_policy(width: int, height: int, policy: ImagePolicy) -> tuple[int, int]:
    """Return the size in pixels that the image processor receives."""
    return [(width, height), *list_resizes(width, height, policy)][-1]


def round_to_patches(width: int, height: int, geometry: PatchGeometry) -> tuple[int, int]:
    """Return the size after Qwen2-VL's rounding to whole merged patches (transformers, ``smart_resize``)."""
    factor = geometry.patch_size * geometry.merge_size
    rounded_height = round(height / factor) * factor
    rounded_width = round(width / factor) * factor
    if rounded_height * rounded_width > geometry.max_pixels:
        beta = math.sqrt(height * width / geometry.max_pixels)
        rounded_height = max(factor, math.floor(height / beta / factor) * factor)
        rounded_width = max(factor, math.floor(width / beta / factor) * factor)
    elif rounded_height * rounded_width < geometry.min_pixels:
        beta = math.sqrt(geometry.min_pixels / (height * width))
        rounded_height = math.ceil(height * beta / factor) * factor
        rounded_width = math.ceil(width * beta / factor) * factor
    return rounded_width, rounded_height


def count_grid(width: int, height: int, policy: ImagePolicy, geometry: PatchGeometry) -> tuple[int, int, int]:
    """Return the patch grid (time, rows, columns) of an image of this native size."""
    width, height = round_to_patches(*resize_by_policy(width, height, policy), geometry)
    return 1, height // geometry.patch_size, width // geometry.patch_size


def count_visual_tokens(width: int, height: int, policy: ImagePolicy, geometry: PatchGeometry | None = None) -> int:
    """Return how many tokens an image of this native size takes in the sequence, start and end marks not counted."""
    geometry = geometry or PatchGeometry()
    _, rows, columns = count_grid(width, height, policy, geometry)
    return rows * columns // geometry.merge_size**2

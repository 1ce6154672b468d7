"""Tests of chatreid_plugin.images: the paper's policy, and the arithmetic of LLaMA-Factory and transformers."""

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.images import (
    ImagePolicy,
    PatchGeometry,
    apply_stage_policy,
    count_grid,
    count_visual_tokens,
    resize_by_policy,
    round_to_patches,
)


edges = st.integers(1, 3000)


@pytest.fixture(scope="module")
def upstream() -> Any:
    """Return LLaMA-Factory's own Qwen2-VL plugin."""
    from llamafactory.data.mm_plugin import Qwen2VLPlugin

    return Qwen2VLPlugin(image_token="<|image_pad|>", video_token="<|video_pad|>", audio_token=None)


@pytest.fixture(scope="module")
def smart_resize() -> Any:
    """Return the function with which transformers' processor rounds a size."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    return smart_resize


@pytest.mark.parametrize(
    ("stage", "size", "expected"),
    [
        # Stage 1: below 256x128 (height x width) by area, so 32,768 pixels.
        (1, (64, 128), (128, 256)),
        (1, (128, 255), (128, 256)),
        (1, (127, 256), (128, 256)),
        (1, (128, 256), (128, 256)),
        (1, (128, 257), (128, 257)),
        (1, (256, 128), (256, 128)),
        (1, (512, 63), (128, 256)),
        (1, (1000, 2000), (1000, 2000)),
        # Stage 2: above 384x192 by area, so 73,728 pixels.
        (2, (64, 128), (64, 128)),
        (2, (192, 384), (192, 384)),
        (2, (384, 192), (384, 192)),
        (2, (192, 385), (192, 384)),
        (2, (193, 384), (192, 384)),
        (2, (100, 737), (100, 737)),
        (2, (100, 738), (192, 384)),
        (3, (64, 128), (64, 128)),
        (3, (1000, 2000), (1000, 2000)),
        (None, (64, 128), (64, 128)),
        (None, (1000, 2000), (1000, 2000)),
    ],
)
def test_stage_gives_the_papers_size(stage: int | None, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert apply_stage_policy(*size, stage) == expected


@settings(deadline=None)
@given(edges, edges, st.sampled_from([1, 2]))
def test_keep_gives_the_papers_area_in_the_crops_own_shape(width: int, height: int, stage: int) -> None:
    stretched = apply_stage_policy(width, height, stage)
    kept = apply_stage_policy(width, height, stage, "keep")
    if stretched == (width, height):
        assert kept == (width, height)
        return
    area = stretched[0] * stretched[1]
    # Each edge is rounded to a whole pixel, by half a pixel at most, and is at least one pixel long.
    scale = (area / (width * height)) ** 0.5
    assert abs(kept[0] - width * scale) <= 0.5 or kept[0] == 1
    assert abs(kept[1] - height * scale) <= 0.5 or kept[1] == 1


def test_keep_differs_from_stretch_where_the_shape_is_not_one_to_two() -> None:
    assert apply_stage_policy(100, 100, 1, "keep") == (181, 181)
    assert apply_stage_policy(400, 400, 2, "keep") == (272, 272)


@pytest.mark.parametrize("stage", [0, 4, -1, "2"])
def test_wrong_stage_is_refused(stage: Any) -> None:
    with pytest.raises(ConfigError, match="chatreid_stage must be 1, 2 or 3"):
        ImagePolicy(stage)


def test_wrong_aspect_is_refused() -> None:
    with pytest.raises(ConfigError, match="chatreid_aspect must be stretch or keep, not 'crop'"):
        ImagePolicy(1, "crop")  # type: ignore[arg-type]


def test_pixel_limits_come_after_the_stage() -> None:
    assert resize_by_policy(64, 128, ImagePolicy(1, image_max_pixels=8192)) == (64, 128)
    assert resize_by_policy(30, 30, ImagePolicy(3, image_min_pixels=3600)) == (60, 60)
    assert resize_by_policy(1, 1, ImagePolicy(1)) == (128, 256)
    assert resize_by_policy(10, 40, ImagePolicy(3)) == (28, 64)


@settings(max_examples=500, deadline=None)
@given(edges, edges, st.sampled_from([1024, 8192, 589824]), st.sampled_from([1, 1024, 3136, 8192]))
def test_pixel_limits_are_llamafactorys(
    upstream: Any, width: int, height: int, max_pixels: int, min_pixels: int
) -> None:
    # Narrower than a pixel after the first limit: LLaMA-Factory itself divides by zero.
    factor = min(1.0, (max_pixels / (width * height)) ** 0.5)
    assume(width * factor >= 1 and height * factor >= 1)
    expected = upstream._get_qwen_video_size_after_regularization(width, height, max_pixels, min_pixels)
    policy = ImagePolicy(image_max_pixels=max_pixels, image_min_pixels=min_pixels)
    assert resize_by_policy(width, height, policy) == expected


GEOMETRIES = [PatchGeometry(), PatchGeometry(16, 2, 65536, 16777216), PatchGeometry(14, 2, 784, 8192)]


@settings(max_examples=500, deadline=None)
@given(st.integers(28, 3000), st.integers(28, 3000), st.sampled_from(GEOMETRIES))
def test_rounding_is_smart_resize(smart_resize: Any, width: int, height: int, geometry: PatchGeometry) -> None:
    expected = smart_resize(
        height, width, geometry.patch_size * geometry.merge_size, geometry.min_pixels, geometry.max_pixels
    )
    assert round_to_patches(width, height, geometry) == expected[::-1]


@settings(max_examples=300, deadline=None)
@given(edges, edges, st.sampled_from([None, 1, 2, 3]), st.sampled_from(["stretch", "keep"]))
def test_tokens_are_what_training_gives(
    upstream: Any, smart_resize: Any, width: int, height: int, stage: int | None, aspect: Any
) -> None:
    policy, geometry = ImagePolicy(stage, aspect), PatchGeometry()
    regular = upstream._get_qwen_video_size_after_regularization(
        *apply_stage_policy(width, height, stage, aspect), policy.image_max_pixels, policy.image_min_pixels
    )
    rows, columns = (edge // 14 for edge in smart_resize(*regular[::-1], 28, geometry.min_pixels, geometry.max_pixels))
    assert count_grid(width, height, policy, geometry) == (1, rows, columns)
    assert count_visual_tokens(width, height, policy) == rows * columns // 4


def test_tokens_of_the_papers_sizes() -> None:
    # 256x128 rounds to 252x140, so 9 x 5; 384x192 to 392x196, so 14 x 7.
    assert count_visual_tokens(64, 128, ImagePolicy(1)) == 45
    assert count_visual_tokens(1000, 2000, ImagePolicy(2)) == 98


@pytest.mark.parametrize(
    ("size", "expected"),
    [((10, 6000), (28, 5040)), ((6000, 10), (5040, 28)), ((28, 5600), (28, 5600)), ((5601, 28), (5040, 28))],
)
def test_edges_and_shapes_are_limited(size: tuple[int, int], expected: tuple[int, int]) -> None:
    # No edge below 28; longer than 200 to 1 becomes 180 to 1.
    assert resize_by_policy(*size, ImagePolicy(image_max_pixels=10**9, image_min_pixels=1)) == expected

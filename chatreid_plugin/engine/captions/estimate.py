"""What captions will cost: tokens, price and time, before anything is sent."""

import json
import math
from collections.abc import Sequence

from ...config import BuildSettings, CaptioningSettings
from ...images import ImagePolicy, count_visual_tokens
from .jobs import CaptionReport, get_captioning, plan_jobs
from .requests import ATTRIBUTES, make_schema, show_prompt, write_prompt


# OpenAI's guide "Images and vision", calculating costs: (base tokens, tokens of a tile of 512 x 512 pixels) by the
# beginning of the model's name; the first that fits counts.
TILE_MODELS = (
    ("gpt-4o-mini", 2833, 5667),
    ("gpt-4o", 85, 170),
    ("gpt-4.1", 85, 170),
    ("gpt-5", 70, 140),
    ("o1", 75, 150),
    ("o3", 75, 150),
)
# The same guide: tokens of a patch of 32 x 32 pixels, whatever the detail.
PATCH_MODELS = (
    ("gpt-4.1-mini", 1.62),
    ("gpt-4.1-nano", 2.46),
    ("gpt-5-mini", 1.62),
    ("gpt-5-nano", 2.46),
    ("o4-mini", 1.72),
)
LARGEST_PATCHES = 1536
# A token of English or JSON has about four characters (OpenAI's help article on tokens).
CHARACTERS_PER_TOKEN = 4
# Our guess at an answer: two sentences, and a line of JSON for each attribute.
TOKENS_PER_DESCRIPTION = 70
TOKENS_PER_ATTRIBUTE = 10


def describe_image_rule(settings: CaptioningSettings) -> str:
    """Return how an image's tokens are counted for this model, in words."""
    model = settings.model
    for name, factor in PATCH_MODELS:
        if model.startswith(name):
            return f"{factor} tokens for each patch of 32x32 pixels, at most {LARGEST_PATCHES} patches"
    for name, base, tile in TILE_MODELS:
        if model.startswith(name):
            if settings.detail == "low":
                return f"{base} tokens for any image (detail: low)"
            return f"{base} tokens, and {tile} for each tile of 512x512 pixels (detail: high)"
    return "a token for every 28x28 pixels, as in Qwen2-VL (the model is none of OpenAI's that we know)"


def count_image_tokens(settings: CaptioningSettings, width: int, height: int) -> int:
    """Return the tokens of an image of this size in pixels, by the rule that ``describe_image_rule`` states."""
    for name, factor in PATCH_MODELS:
        if settings.model.startswith(name):
            patches = math.ceil(width / 32) * math.ceil(height / 32)
            return math.ceil(min(patches, LARGEST_PATCHES) * factor)
    for name, base, tile in TILE_MODELS:
        if settings.model.startswith(name):
            return base if settings.detail == "low" else base + tile * _count_tiles(width, height)
    return count_visual_tokens(width, height, ImagePolicy())


def _count_tiles(width: int, height: int) -> int:
    """Count tiles after OpenAI's resizing: into 2048 x 2048, then the shorter side to 768, never enlarged."""
    scale = min(1.0, 2048 / max(width, height))
    scale = min(scale, 768 / min(width, height))
    return math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


def count_text_tokens(settings: CaptioningSettings) -> int:
    """Return the tokens of a request beside the image, estimated by length; the schema counts as input."""
    before, after = write_prompt(settings.captions_per_image, structured=True)
    return math.ceil(len(before + after + json.dumps(make_schema())) / CHARACTERS_PER_TOKEN)


def count_answer_tokens(settings: CaptioningSettings) -> int:
    """Return the tokens of an answer, estimated."""
    return TOKENS_PER_DESCRIPTION * settings.captions_per_image + TOKENS_PER_ATTRIBUTE * len(ATTRIBUTES)


def compute_price(settings: CaptioningSettings, input_tokens: int, output_tokens: int) -> float | None:
    """Return the price in the currency of the recipe's prices, or None if it has none."""
    prices = (settings.price_per_million_input_tokens, settings.price_per_million_output_tokens)
    if prices[0] is None or prices[1] is None:
        return None
    return (input_tokens * prices[0] + output_tokens * prices[1]) / 1e6


def estimate_captions(settings: BuildSettings, names: Sequence[str], limit: int | None) -> CaptionReport:
    """Return what captioning would cost and what would be sent; nothing is sent or written.

    Raises:
        ConfigError: no ``captioning`` block, or an unknown source.
        DataError: a manifest is missing.
    """
    captioning = get_captioning(settings)
    jobs = plan_jobs(settings, names, limit)
    sizes = [(record.width, record.height) for job in jobs for record in job.waiting]
    image_tokens = sum(count_image_tokens(captioning, *size) for size in sizes)
    input_tokens = image_tokens + len(sizes) * count_text_tokens(captioning)
    output_tokens = len(sizes) * count_answer_tokens(captioning)
    price = compute_price(captioning, input_tokens, output_tokens)
    minutes = _estimate_minutes(captioning, len(sizes), input_tokens + output_tokens)
    prompt = show_prompt(captioning, structured=True)
    lines = [
        f"{job.source}: {job.images} training images, {job.answered} answered before, {len(job.waiting)} to ask about"
        for job in jobs
    ]
    lines += [
        f"endpoint: {captioning.base_url}, model {captioning.model}",
        f"input: about {input_tokens:,} tokens, {image_tokens:,} of them images: {describe_image_rule(captioning)}",
        f"output: about {output_tokens:,} tokens",
        "price: not known; set price_per_million_input_tokens and price_per_million_output_tokens"
        if price is None
        else f"price: about {price:,.2f}; the Batch API (--batch-write) costs half at OpenAI",
        "time: as fast as the endpoint answers (no limit per minute is set)"
        if minutes is None
        else f"time: at least {minutes:,.1f} minutes at the limits per minute",
        "prompt, once for each image:",
        prompt,
    ]
    values = {
        "sources": [
            {"source": j.source, "images": j.images, "answered": j.answered, "waiting": len(j.waiting)} for j in jobs
        ],
        "base_url": captioning.base_url,
        "model": captioning.model,
        "input_tokens": input_tokens,
        "image_tokens": image_tokens,
        "output_tokens": output_tokens,
        "price": price,
        "minutes": minutes,
        "prompt": prompt,
    }
    return CaptionReport(values, lines)


def _estimate_minutes(settings: CaptioningSettings, requests: int, tokens: int) -> float | None:
    limits = ((requests, settings.requests_per_minute), (tokens, settings.tokens_per_minute))
    return max((amount / limit for amount, limit in limits if limit is not None), default=None)

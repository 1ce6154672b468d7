"""Captions and attributes of training images from an OpenAI-compatible endpoint (paper section 3.2), and their price.

One request for each image; answers are appended as they come, so that a run can be killed and started again.
"""

import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from ...config import BuildSettings, CaptioningSettings
from ...errors import ConfigError, DataError
from ...images import ImagePolicy, count_visual_tokens
from ...openai_answers import BrokenAnswer
from ...openai_client import (
    FAILURES,
    PROBE_SIZE,
    READINGS,
    OpenAIClient,
    Server,
    encode_grey_picture,
    is_local,
    read_key,
)
from ...printing import say
from ...records import ImageRecord
from .batches import read_batches, write_batches
from .jobs import CaptionJob, CaptionReport, CaptionRun, get_captioning, plan_jobs, start_run
from .requests import (
    ATTRIBUTES,
    Description,
    Refusal,
    encode_image,
    make_body,
    make_schema,
    read_completion,
    show_prompt,
    write_prompt,
)


KEY_SETTING = "captioning.api_key_variable"
# OpenAI's guide "Images and vision", calculating costs, by the beginning of the model's name; the first that fits
# counts: tokens of a patch of 32 x 32 pixels, whatever the detail, or (base tokens, tokens of a tile of 512 x 512).
IMAGE_RULES: dict[str, float | tuple[int, int]] = {
    "gpt-4.1-mini": 1.62,
    "gpt-4.1-nano": 2.46,
    "gpt-5-mini": 1.62,
    "gpt-5-nano": 2.46,
    "o4-mini": 1.72,
    "gpt-4o-mini": (2833, 5667),
    "gpt-4o": (85, 170),
    "gpt-4.1": (85, 170),
    "gpt-5": (70, 140),
    "o1": (75, 150),
    "o3": (75, 150),
}
LARGEST_PATCHES = 1536
# A token of English or JSON has about four characters (OpenAI's help article on tokens).
CHARACTERS_PER_TOKEN = 4
# Our guess at an answer: two sentences, and a line of JSON for each attribute.
TOKENS_PER_DESCRIPTION = 70
TOKENS_PER_ATTRIBUTE = 10


def caption_sources(
    settings: BuildSettings,
    names: Sequence[str] = (),
    *,
    dry_run: bool = False,
    limit: int | None = None,
    batch_write: Path | None = None,
    batch_read: Sequence[Path] = (),
) -> CaptionReport:
    """Ask an endpoint for captions and attributes, or estimate, or write or read files of the Batch API.

    Raises:
        ConfigError: two ways at once, or see ``caption_images``, ``write_batches``, ``read_batches``.
    """
    if dry_run + (batch_write is not None) + bool(batch_read) > 1:
        raise ConfigError("Give one of --dry-run, --batch-write and --batch-read, not several.")
    if dry_run:
        return estimate_captions(settings, names, limit)
    if batch_write is not None:
        return write_batches(settings, names, batch_write, limit)
    if batch_read:
        return read_batches(settings, names, batch_read)
    return caption_images(settings, names, limit)


def caption_images(settings: BuildSettings, names: Sequence[str] = (), limit: int | None = None) -> CaptionReport:
    """Ask about every training image that has no answer yet, and return what was done.

    Args:
        settings: the recipe.
        names: sources; every source that trains a stage if empty.
        limit: ask about so many images at most.

    Raises:
        ConfigError: no ``captioning`` block, an unknown source, or no key.
        DataError: a manifest is missing, or more images failed than ``max_failures`` allows.
        UpstreamError: the endpoint is out of reach, or refuses the key or the model.
    """
    captioning = get_captioning(settings)
    jobs = plan_jobs(settings, names, limit)
    images = sum(len(job.waiting) for job in jobs)
    if images:
        read_key(captioning.api_key_variable, captioning.base_url, KEY_SETTING)  # before any file is opened
        _announce(captioning, images)
    with start_run(captioning, jobs, images) as run:
        try:
            if images:
                _ask_about_all(captioning, run)
        except KeyboardInterrupt:
            say("Interrupted; the answers so far are kept, the same command goes on from there.", aside=True)
            raise
    return run.report()


def _announce(settings: CaptioningSettings, images: int) -> None:
    if not is_local(settings.base_url):
        host, prompt = urlsplit(settings.base_url).netloc, show_prompt(settings, structured=True)
        news = f"Sending {images} images of people to {host} (model {settings.model}), with:\n{prompt}"
        say(news, aside=True)


def _ask_about_all(settings: CaptioningSettings, run: CaptionRun) -> None:
    server = Server(
        settings.base_url,
        settings.api_key_variable,
        KEY_SETTING,
        "the captioning block",
        settings.timeout,
        settings.retries,
        settings.concurrency,
        settings.requests_per_minute,
        settings.tokens_per_minute,
    )
    client = OpenAIClient(server, settings.model)
    try:
        structured = client.probe([lambda: keeps_schema(client, settings), lambda: takes_words(client, settings)])
        if not structured:
            added = show_prompt(settings, structured=False)
            tqdm.write(f"{client.host} does not keep to a JSON schema; it is asked:\n{added}", file=sys.stderr)

        def ask(crop: tuple[CaptionJob, ImageRecord]) -> Description:
            job, record = crop
            url = encode_image(job.root / record.path)
            return describe(client, settings, url, (record.width, record.height), structured=structured)

        waiting = ((job, record) for job in run.jobs for record in job.waiting)
        for (job, record), answer in client.map(ask, waiting):
            try:
                description = answer.result()
            except (DataError, *FAILURES) as failure:
                run.keep_failure(job, record, str(failure))
                run.check_budget()
            else:
                run.keep_answer(job, record, description)
            price = compute_price(settings, client.input_tokens, client.output_tokens)
            used = f"{client.input_tokens + client.output_tokens} tokens" + ("" if price is None else f", {price:.2f}")
            run.bar.set_postfix_str(f"{len(run.reasons)} failed, {used}", refresh=False)
    finally:
        client.close()


def describe(
    client: OpenAIClient,
    settings: CaptioningSettings,
    url: str,
    size: tuple[int, int],
    *,
    structured: bool,
    readings: int = READINGS,
) -> Description:
    """Return what the server says of an image.

    Args:
        client: the server.
        settings: how it is asked.
        url: the image as a data URL.
        size: its width and height.
        structured: whether the request carries the JSON schema, or the text does.
        readings: how many answers are tried to be read; a refusal is one that cannot be.

    Raises:
        BrokenAnswer, RejectedRequest, TemporaryFailure, UpstreamError: see ``OpenAIClient.ask``.
    """
    tokens = count_text_tokens(settings) + count_answer_tokens(settings) + count_image_tokens(settings, *size)
    body = make_body(settings, url, structured=structured)
    read = partial(read_completion, count=settings.captions_per_image)
    return client.ask("/chat/completions", body, read, tokens, readings)


def keeps_schema(client: OpenAIClient, settings: CaptioningSettings) -> bool:
    """Ask about a grey picture with a JSON schema; return whether the server keeps to it."""
    try:
        describe(client, settings, encode_grey_picture(), PROBE_SIZE, structured=True, readings=1)
    except Refusal:
        return True
    except BrokenAnswer:
        return False
    return True


def takes_words(client: OpenAIClient, settings: CaptioningSettings) -> bool:
    """Ask about a grey picture without one; return False, as there is no schema to keep to."""
    with suppress(BrokenAnswer):
        describe(client, settings, encode_grey_picture(), PROBE_SIZE, structured=False, readings=1)
    return False


def _find_image_rule(model: str) -> float | tuple[int, int] | None:
    return next((rule for name, rule in IMAGE_RULES.items() if model.startswith(name)), None)


def describe_image_rule(settings: CaptioningSettings) -> str:
    """Return how an image's tokens are counted for this model, in words."""
    rule = _find_image_rule(settings.model)
    if rule is None:
        return "a token for every 28x28 pixels, as in Qwen2-VL (the model is none of OpenAI's that we know)"
    if not isinstance(rule, tuple):
        return f"{rule} tokens for each patch of 32x32 pixels, at most {LARGEST_PATCHES} patches"
    base, tile = rule
    if settings.detail == "low":
        return f"{base} tokens for any image (detail: low)"
    return f"{base} tokens, and {tile} for each tile of 512x512 pixels (detail: high)"


def count_image_tokens(settings: CaptioningSettings, width: int, height: int) -> int:
    """Return the tokens of an image of this size in pixels, by the rule that ``describe_image_rule`` states."""
    rule = _find_image_rule(settings.model)
    if rule is None:
        return count_visual_tokens(width, height, ImagePolicy())
    if not isinstance(rule, tuple):
        patches = math.ceil(width / 32) * math.ceil(height / 32)
        return math.ceil(min(patches, LARGEST_PATCHES) * rule)
    base, tile = rule
    return base if settings.detail == "low" else base + tile * _count_tiles(width, height)


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

"""Captions and attributes of training images from an OpenAI-compatible endpoint (paper section 3.2).

One request for each image; answers are appended as they come, so that a run can be killed and started again.
"""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from PIL import Image
from tqdm import tqdm

from ...config import BuildSettings, CaptioningSettings
from ...crops import encode_picture
from ...errors import ConfigError, DataError, UpstreamError
from ...printing import say
from ...records import ImageRecord
from ...servers.answers import BrokenAnswer
from ...servers.client import RejectedRequest, ServerAddress, ServerClient, TemporaryFailure
from ...servers.key import is_local, read_key
from ...servers.pace import Pace
from .batches import read_batches, write_batches
from .estimate import (
    compute_price,
    count_answer_tokens,
    count_image_tokens,
    count_text_tokens,
    estimate_captions,
)
from .jobs import CaptionJob, CaptionReport, get_captioning, plan_jobs
from .requests import (
    Description,
    Refusal,
    UnreadableAnswer,
    encode_image,
    make_body,
    read_completion,
    show_prompt,
)
from .run import CaptionRun, start_run


# How often an image is asked about whose answers are refusals or cannot be read.
READINGS = 3
KEY_SETTING = "captioning.api_key_variable"
_PROBE_SIZE = (64, 128)
# Tokens of one request; more is a server's mistake, and would hold back all others.
_MOST_USED = 10_000_000


class Endpoint:
    """An OpenAI-compatible server, asked within its limits.

    Attributes:
        settings: where it is and how it is asked.
        host: for messages.
        structured: whether requests carry the JSON schema; ``probe`` finds out whether the server keeps to it.
        input_tokens: used so far, as the server counts.
        output_tokens: used so far, as the server counts.
    """

    def __init__(self, settings: CaptioningSettings) -> None:
        self.settings = settings
        self.structured = True
        self.input_tokens = 0
        self.output_tokens = 0
        address = ServerAddress(
            settings.base_url,
            settings.model,
            settings.api_key_variable,
            settings.timeout,
            settings.retries,
            "the captioning block",
            KEY_SETTING,
        )
        self._client = ServerClient(address, Pace(settings.requests_per_minute, settings.tokens_per_minute))
        self.host = self._client.host
        self._text_tokens = count_text_tokens(settings) + count_answer_tokens(settings)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def probe(self) -> None:
        """Find out, with a grey picture, whether the server keeps to a JSON schema.

        Raises:
            UpstreamError: it is out of reach, or refuses the key, the model or the whole request.
        """
        url = encode_picture(Image.new("RGB", _PROBE_SIZE, "grey"))
        rejection = ""
        for structured in (True, False):
            self.structured = structured
            try:
                read_completion(await self._ask(url, *_PROBE_SIZE), self.settings.captions_per_image)
                return
            except Refusal:
                return
            except UnreadableAnswer:
                self.structured = False
                return
            except RejectedRequest as failure:
                rejection = str(failure)
            except TemporaryFailure as failure:
                raise UpstreamError(f"{self.host} does not answer: {failure}.") from None
        raise UpstreamError(
            f"{self.host} does not take our request ({rejection}). Check model, base_url and extra_body of the "
            "captioning block; the model has to read images."
        )

    async def describe(self, job: CaptionJob, record: ImageRecord) -> Description:
        """Return what the server says of an image.

        Raises:
            DataError: the image cannot be read.
            UnreadableAnswer: ``READINGS`` answers were refusals or could not be read.
            RejectedRequest: the server does not take this image.
            TemporaryFailure: no answer after all retries.
            UpstreamError: no image will ever be answered: wrong key, wrong model, no credit.
        """
        url = encode_image(job.root / record.path)
        for _ in range(READINGS - 1):
            try:
                return await self._read(url, record)
            except UnreadableAnswer:
                continue
        return await self._read(url, record)

    async def _read(self, url: str, record: ImageRecord) -> Description:
        answer = await self._ask(url, record.width, record.height)
        return read_completion(answer, self.settings.captions_per_image)

    async def _ask(self, url: str, width: int, height: int) -> object:
        tokens = self._text_tokens + count_image_tokens(self.settings, width, height)
        body = make_body(self.settings, url, structured=self.structured)
        try:
            answer = await self._client.ask("/chat/completions", body, tokens)
        except BrokenAnswer as error:
            raise UnreadableAnswer(str(error)) from None
        self._count(answer, tokens)
        return answer

    def _count(self, answer: object, estimated: int) -> None:
        usage = cast(dict[str, Any], answer).get("usage") if isinstance(answer, dict) else None
        found = cast(dict[str, Any], usage) if isinstance(usage, dict) else {}
        counts = [found.get(name) for name in ("prompt_tokens", "completion_tokens")]
        used = [count if isinstance(count, int) and 0 <= count <= _MOST_USED else 0 for count in counts]
        self.input_tokens += used[0]
        self.output_tokens += used[1]
        self._client.pace.charge(sum(used) - estimated)


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
        read_key(captioning.api_key_variable, captioning.base_url, KEY_SETTING)
        _announce(captioning, images)
    with start_run(captioning, jobs, images) as run:
        try:
            if images:
                asyncio.run(_ask_about_all(captioning, run))
        except KeyboardInterrupt:
            say("Interrupted; the answers so far are kept, the same command goes on from there.", aside=True)
            raise
    return run.report()


def _announce(settings: CaptioningSettings, images: int) -> None:
    if not is_local(settings.base_url):
        host, prompt = urlsplit(settings.base_url).netloc, show_prompt(settings, structured=True)
        news = f"Sending {images} images of people to {host} (model {settings.model}), with:\n{prompt}"
        say(news, aside=True)


async def _ask_about_all(settings: CaptioningSettings, run: CaptionRun) -> None:
    endpoint = Endpoint(settings)
    try:
        await endpoint.probe()
        if not endpoint.structured:
            added = show_prompt(settings, structured=False)
            tqdm.write(f"{endpoint.host} does not keep to a JSON schema; it is asked:\n{added}", file=sys.stderr)
        waiting = ((job, record) for job in run.jobs for record in job.waiting)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(settings.concurrency, run.images)):
                group.create_task(_work(endpoint, run, waiting))
    except BaseExceptionGroup as failures:
        # The first failure has cancelled the other workers.
        raise failures.exceptions[0] from None
    finally:
        await endpoint.close()


async def _work(endpoint: Endpoint, run: CaptionRun, waiting: Iterator[tuple[CaptionJob, ImageRecord]]) -> None:
    """Take image after image until none is left; the other workers take from the same iterator."""
    for job, record in waiting:
        try:
            description = await endpoint.describe(job, record)
        except (DataError, UnreadableAnswer, RejectedRequest, TemporaryFailure) as failure:
            run.keep_failure(job, record, str(failure))
            run.check_budget()
        else:
            run.keep_answer(job, record, description)
        price = compute_price(endpoint.settings, endpoint.input_tokens, endpoint.output_tokens)
        used = f"{endpoint.input_tokens + endpoint.output_tokens} tokens" + ("" if price is None else f", {price:.2f}")
        run.bar.set_postfix_str(f"{len(run.reasons)} failed, {used}", refresh=False)

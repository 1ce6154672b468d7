"""OpenAI's Batch API by hand: request files to upload, and its output and error files read back.

Format and limits: OpenAI's guide "Batch API": a JSON object a line, at most 50,000 requests and 200 MB a file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from ...config import BuildSettings, CaptioningSettings
from ...errors import DataError
from ...openai_answers import BrokenAnswer
from ...shards import open_atomically, read_json_lines
from .jobs import CaptionJob, CaptionReport, get_captioning, plan_jobs, read_answered, start_run
from .requests import Description, encode_image, make_body, read_completion


MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000
_URL = "/v1/chat/completions"


def write_batches(
    settings: BuildSettings, names: Sequence[str], directory: Path, limit: int | None = None
) -> CaptionReport:
    """Write request files ``<source>-<number>.jsonl`` for the images that have no answer yet.

    Images that a request file in the folder already asks about are left out, so a killed command can be run again; to
    ask about failed images once more, give another folder. A request's ``custom_id`` is the image's id,
    ``<source>/<path>``.

    Args:
        settings: the recipe.
        names: sources; every source that trains a stage if empty.
        directory: where the files go.
        limit: so many images at most.

    Raises:
        ConfigError: no ``captioning`` block, or an unknown source.
        DataError: a manifest is missing, or the folder holds a damaged request file.
    """
    captioning = get_captioning(settings)
    files: list[dict[str, Any]] = []
    damaged: list[str] = []
    asked_before = 0
    for job in plan_jobs(settings, names, limit):
        present = sorted(directory.glob(f"{job.source}-*.jsonl"))
        asked = {str(line.get("custom_id")) for path in present for _, line in read_json_lines(path)}
        asked_before += len(asked)
        lines = _list_requests(captioning, job, asked, damaged)
        for path, count in _write_files(directory, job.source, lines, len(present)):
            files.append({"file": str(path), "requests": count})
    text = [f"{file['file']}: {file['requests']} requests" for file in files] or ["Nothing new to ask about."]
    text += [f"{asked_before} images are asked about in older files of {directory}"] if asked_before else []
    text += [f"{len(damaged)} images were left out. First: {damaged[0]}"] if damaged else []
    text.append("Upload each file to the Batch API, then: chatreid caption ... --batch-read OUTPUT_FILE")
    return CaptionReport({"files": files, "asked_before": asked_before, "unreadable": damaged}, text)


def _list_requests(
    settings: CaptioningSettings, job: CaptionJob, asked: set[str], damaged: list[str]
) -> Iterator[bytes]:
    for record in tqdm(job.waiting, desc=job.source, unit="image"):
        if record.image_id in asked:
            continue
        try:
            body = make_body(settings, encode_image(job.root / record.path), structured=True)
        except DataError as error:
            damaged.append(str(error))
            continue
        request = {"custom_id": record.image_id, "method": "POST", "url": _URL, "body": body}
        yield json.dumps(request, ensure_ascii=False).encode("utf-8") + b"\n"


def _write_files(directory: Path, source: str, lines: Iterator[bytes], number: int) -> Iterator[tuple[Path, int]]:
    """Write lines into files within the limits and yield each file with its number of requests."""
    line = next(lines, None)
    while line is not None:
        path = directory / f"{source}-{number:04d}.jsonl"
        count = size = 0
        with open_atomically(path) as temporary, temporary.open("wb") as file:
            while line is not None and count < MOST_REQUESTS and (count == 0 or size + len(line) <= MOST_BYTES):
                file.write(line)
                count, size = count + 1, size + len(line)
                line = next(lines, None)
        yield path, count
        number += 1


def read_batches(settings: BuildSettings, names: Sequence[str], files: Sequence[Path]) -> CaptionReport:
    """Add the answers of the Batch API's output and error files to the captions files.

    Answers are checked as those of the online mode; images answered before are passed over.

    Args:
        settings: the recipe.
        names: sources; every source that trains a stage if empty.
        files: output and error files, in any order.

    Raises:
        ConfigError: no ``captioning`` block, or an unknown source.
        DataError: a file is missing or damaged, names an image that the sources do not have (nothing is written
            then), or more images failed than ``max_failures`` allows (the answers are kept).
    """
    captioning = get_captioning(settings)
    jobs = plan_jobs(settings, names)
    waiting = {record.image_id: (job, record) for job in jobs for record in job.waiting}
    known = waiting.keys() | {f"{job.source}/{path}" for job in jobs for path in read_answered(job.answers)}
    found: set[str] = set()
    for file in files:
        for number, line in read_json_lines(file):
            name = str(line.get("custom_id"))
            if name not in known:
                raise DataError(
                    f"{file}, line {number}: custom_id {name!r} is no training image of these sources. "
                    "Name the recipe that the request file was written with."
                )
            found.add(name)
    failed: dict[str, str] = {}
    with start_run(captioning, jobs, len(found & waiting.keys())) as run:
        for line in (line for file in files for _, line in read_json_lines(file)):
            name = str(line["custom_id"])
            if name not in waiting:
                continue
            try:
                description = _read_line(line, captioning.captions_per_image)
            except BrokenAnswer as failure:
                failed[name] = str(failure)
                continue
            run.keep_answer(*waiting.pop(name), description)
        for name in failed.keys() & waiting.keys():
            run.keep_failure(*waiting[name], failed[name])
        run.check_budget()
    return run.report()


def _read_line(line: Mapping[str, Any], count: int) -> Description:
    response = line.get("response")
    if not isinstance(response, dict):
        raise BrokenAnswer(f"no response: {_get_message(line)}")
    fields = cast(dict[str, Any], response)
    if fields.get("status_code") != 200:
        raise BrokenAnswer(f"{fields.get('status_code')}: {_get_message(fields.get('body'))}")
    return read_completion(fields.get("body"), count)


def _get_message(value: object) -> str:
    """Return the message of ``{"error": {"message": ...}}``, or the error itself in another form."""
    error = cast(dict[str, Any], value).get("error") if isinstance(value, dict) else value
    return str(cast(dict[str, Any], error).get("message", error) if isinstance(error, dict) else error)

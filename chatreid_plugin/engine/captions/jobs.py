"""Which crops still need captions, the append-only files that keep answers and failures, and the count of a run."""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from ...config import BuildSettings, CaptioningSettings, SourceSettings
from ...errors import ConfigError, DataError
from ...records import ImageRecord
from ...shards import read_manifest
from ..manifests import find_manifest
from .requests import Description


_BLOCK = 1 << 16
_SHOWN_REASONS = 5


@dataclass(frozen=True, slots=True)
class CaptionJob:
    """The training images of one source and what is known about their captions.

    Attributes:
        source: name of the source.
        root: the folder that the images' paths are relative to.
        answers: the captions file, ``<manifest_dir>/<source>.captions.jsonl``.
        failures: images of the last run without an answer, and why, ``<source>.caption_failures.jsonl``.
        waiting: images to ask about.
        images: number of training images.
        answered: how many of them were answered before.
        is_used: the recipe's ``captions`` key of the source names the captions file.
    """

    source: str
    root: Path
    answers: Path
    failures: Path
    waiting: tuple[ImageRecord, ...]
    images: int
    answered: int
    is_used: bool


@dataclass(frozen=True, slots=True)
class CaptionReport:
    """What a command did: ``values`` for programs, ``lines`` for people."""

    values: Mapping[str, Any]
    lines: Sequence[str]

    def to_json(self) -> str:
        """Return the values as indented JSON."""
        return json.dumps(self.values, indent=2, ensure_ascii=False)

    def render(self) -> str:
        """Return the lines as one text."""
        return "\n".join(self.lines)


def get_captioning(settings: BuildSettings) -> CaptioningSettings:
    """Return the recipe's ``captioning`` block.

    Raises:
        ConfigError: it has none.
    """
    if settings.captioning is None:
        raise ConfigError(
            "The recipe has no `captioning` block. Add one with at least `model`, and `base_url` for an endpoint "
            "other than OpenAI's; examples/data_engine.yaml shows it."
        )
    return settings.captioning


def plan_jobs(settings: BuildSettings, names: Sequence[str], limit: int | None = None) -> list[CaptionJob]:
    """Return a job for each source named, or for every source that trains a stage if none is.

    Args:
        settings: the recipe.
        names: sources.
        limit: ask about so many images at most, over all sources.

    Raises:
        ConfigError: a name is not among the recipe's sources.
        DataError: a manifest is missing, or an answers file is damaged.
    """
    known = {source.name: source for source in settings.sources}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"The recipe has no source {', '.join(unknown)}; it has {', '.join(known)}.")
    chosen = [known[name] for name in names] or [source for source in settings.sources if source.stages]
    jobs: list[CaptionJob] = []
    for source in chosen:
        job = _plan_job(settings, source, limit)
        limit = None if limit is None else limit - len(job.waiting)
        jobs.append(job)
    return jobs


def _plan_job(settings: BuildSettings, source: SourceSettings, limit: int | None) -> CaptionJob:
    manifest = find_manifest(settings, source.name)
    answers = manifest.with_name(f"{source.name}.captions.jsonl")
    records, root = read_manifest(manifest)
    training = [record for record in records if record.split == "train"]
    answered = read_answered(answers)
    waiting = [record for record in training if record.path not in answered]
    return CaptionJob(
        source=source.name,
        root=root,
        answers=answers,
        failures=manifest.with_name(f"{source.name}.caption_failures.jsonl"),
        waiting=tuple(waiting[:limit]),
        images=len(training),
        answered=len(training) - len(waiting),
        is_used=source.captions is not None and source.captions.resolve() == answers.resolve(),
    )


def read_answered(path: Path) -> set[str]:
    """Return the paths of the images that an answers file describes; a line that a kill cut short does not count.

    Raises:
        DataError: a complete line is damaged.
    """
    if not path.exists():
        return set()
    answered: set[str] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                answered.add(str(json.loads(line)["path"]))
            except (ValueError, TypeError, KeyError):
                raise DataError(
                    f"{path}, line {number}: no answer that this command wrote. Remove the line."
                ) from None
    return answered


@dataclass(frozen=True, slots=True)
class LineLog:
    """An open JSON Lines file; a line is on the disk when ``append`` returns."""

    file: BinaryIO

    def append(self, value: Mapping[str, Any]) -> None:
        """Write one line and wait until the disk has it: an answer has been paid for.

        Raises:
            DataError: the disk is full or cannot be written; no part of the line is left.
        """
        # Half a character in a reason becomes JSON's escape of it.
        left = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        number = self.file.fileno()
        end = os.fstat(number).st_size
        try:
            while left:
                left = left[os.write(number, left) :]
            os.fsync(number)
        except OSError as error:
            os.ftruncate(number, end)
            raise DataError(
                f"{self.file.name} cannot be written: {error}. Make room or check the permissions, then run again: "
                "the lines in it are kept, and the command goes on behind them."
            ) from None


@contextmanager
def open_log(path: Path, *, keep: bool) -> Generator[LineLog, None, None]:
    """Open a JSON Lines file for appending; a last line that a kill cut short is removed, or everything if not kept.

    A file that is empty in the end is removed.

    Raises:
        DataError: another process has it open.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"Another `chatreid caption` is writing {path}. Wait until it ends.") from None
        file.truncate(_find_end_of_lines(file) if keep else 0)
        try:
            yield LineLog(file)
        finally:
            if file.seek(0, os.SEEK_END) == 0:
                path.unlink()


def _find_end_of_lines(file: BinaryIO) -> int:
    """Return the length of a file up to and including its last line end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


@dataclass(slots=True)
class CaptionRun:
    """Counts of one run over one or more sources, and where its lines go.

    Attributes:
        settings: for the model's name and the budget.
        jobs: the sources.
        images: number of images that answers are expected for.
        bar: shows the progress.
        answered: source -> images answered in this run, occluded ones included.
        occluded: source -> images whose clothing was not recognised.
        failed: source -> images without an answer.
        reasons: one for each image without an answer, with the image's path.
        logs: source -> files of the answers and the failures.
    """

    settings: CaptioningSettings
    jobs: list[CaptionJob]
    images: int
    bar: "tqdm[Any]"
    answered: Counter[str] = field(default_factory=Counter[str])
    occluded: Counter[str] = field(default_factory=Counter[str])
    failed: Counter[str] = field(default_factory=Counter[str])
    reasons: list[str] = field(default_factory=list[str])
    logs: dict[str, tuple[LineLog, LineLog]] = field(default_factory=dict[str, tuple[LineLog, LineLog]])

    def keep_answer(self, job: CaptionJob, record: ImageRecord, description: Description) -> None:
        """Append an answer to the source's captions file."""
        self.logs[job.source][0].append(description.make_line(record.path, self.settings.model))
        self.answered[job.source] += 1
        self.occluded[job.source] += not description.clothing_recognised
        self.bar.update()

    def keep_failure(self, job: CaptionJob, record: ImageRecord, reason: str) -> None:
        """Append a failure to the source's file of failures."""
        self.logs[job.source][1].append({"path": record.path, "reason": reason, "model": self.settings.model})
        self.failed[job.source] += 1
        self.reasons.append(f"{record.path}: {reason}")
        self.bar.update()

    def check_budget(self) -> None:
        """Stop a run in which too many images fail.

        Raises:
            DataError: more images failed than ``max_failures`` allows; names the last reasons.
        """
        if len(self.reasons) > self.settings.max_failures * self.images:
            last = "\n".join(f"  {reason}" for reason in self.reasons[-_SHOWN_REASONS:])
            raise DataError(
                f"{len(self.reasons)} of {self.images} images have no answer, more than captioning.max_failures "
                f"({self.settings.max_failures:g}) allows. The answers are kept, and the same command goes on from "
                f"there; all failures: {', '.join(str(job.failures) for job in self.jobs)}. The last ones:\n{last}"
            )

    def report(self) -> CaptionReport:
        """Return what the run did, source by source."""
        rows: list[dict[str, Any]] = []
        lines: list[str] = []
        for job in self.jobs:
            name = job.source
            row = {
                "source": name,
                "images": job.images,
                "answered_before": job.answered,
                "answered": self.answered[name],
                "occluded": self.occluded[name],
                "failed": self.failed[name],
                "captions": str(job.answers),
            }
            rows.append(row)
            lines.append(
                f"{name}: {row['answered']} images answered ({row['occluded']} occluded), {job.answered} before, "
                f"{row['failed']} failed, of {job.images}: {job.answers}"
            )
            if row["failed"]:
                lines.append(f"{name}: the same command asks about the failed images again; see {job.failures}")
            if not job.is_used:
                lines.append(f"{name}: to use them, set this source's `captions: {job.answers}` in the recipe")
        return CaptionReport({"sources": rows}, lines)


@contextmanager
def start_run(settings: CaptioningSettings, jobs: list[CaptionJob], images: int) -> Generator[CaptionRun, None, None]:
    """Open the files of a run; failures of an earlier run are forgotten, since they are asked about again.

    Raises:
        DataError: another process is writing the same answers.
    """
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=images, desc="captions", unit="image"))
        run = CaptionRun(settings, jobs, images, bar)
        for job in jobs:
            answers = stack.enter_context(open_log(job.answers, keep=True))
            run.logs[job.source] = (answers, stack.enter_context(open_log(job.failures, keep=False)))
        yield run

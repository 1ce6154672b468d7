"""The bookkeeping of one captioning run: progress, answers and failures on disk, and the failure budget."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from ...config import CaptioningSettings
from ...errors import DataError
from ...records import ImageRecord
from .jobs import CaptionJob, CaptionReport, LineLog, open_log
from .requests import Description


_SHOWN_REASONS = 5


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
    answered: dict[str, int] = field(default_factory=dict[str, int])
    occluded: dict[str, int] = field(default_factory=dict[str, int])
    failed: dict[str, int] = field(default_factory=dict[str, int])
    reasons: list[str] = field(default_factory=list[str])
    logs: dict[str, tuple[LineLog, LineLog]] = field(default_factory=dict[str, tuple[LineLog, LineLog]])

    def keep_answer(self, job: CaptionJob, record: ImageRecord, description: Description) -> None:
        """Append an answer to the source's captions file."""
        self.logs[job.source][0].append(description.make_line(record.path, self.settings.model))
        self.answered[job.source] = self.answered.get(job.source, 0) + 1
        if not description.clothing_recognised:
            self.occluded[job.source] = self.occluded.get(job.source, 0) + 1
        self.bar.update()

    def keep_failure(self, job: CaptionJob, record: ImageRecord, reason: str) -> None:
        """Append a failure to the source's file of failures."""
        self.logs[job.source][1].append({"path": record.path, "reason": reason, "model": self.settings.model})
        self.failed[job.source] = self.failed.get(job.source, 0) + 1
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
                "answered": self.answered.get(name, 0),
                "occluded": self.occluded.get(name, 0),
                "failed": self.failed.get(name, 0),
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

"""Evaluations with one model, one after another: what each would do, that they can be done, and a table of all."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..config import load_settings
from ..errors import ConfigError, DataError
from ..printing import say
from .backends import Models
from .comparison import Run, write_comparison
from .distributed import Processes
from .loader import load_benchmark
from .questions import describe_cost
from .report import Results
from .run import run_evaluation
from .settings import EvalSettings
from .splits import choose_split, list_manifests, list_shared_parts


def load_evaluations(
    configs: Sequence[Path], overrides: Sequence[str], *, skip_missing: bool = False
) -> list[EvalSettings]:
    """Return the settings of each file with the same ``key=value`` overrides; ``{file}`` in a folder is a file's name.

    Raises:
        ConfigError: a file or an override is wrong, or two evaluations would write into one folder.
        DataError: manifests do not exist, of several files or with ``skip_missing`` of all; lists them.
    """
    found: list[EvalSettings] = []
    for path in configs:
        settings = load_settings(path, overrides, EvalSettings)
        folder = str(settings.output.output_dir).replace("{file}", path.stem)
        found.append(settings.replace(output={"output_dir": Path(folder)}))
    _refuse_shared_folders(configs, found)
    if len(found) == 1 and not skip_missing:
        return found
    missing = {
        path: [manifest for manifest in list_manifests(one).values() if not manifest.is_file()]
        for path, one in zip(configs, found, strict=True)
    }
    lines = [f"  {path}: {', '.join(map(str, files))}" for path, files in missing.items() if files]
    if lines and (len(lines) == len(found) or not skip_missing):
        advice = "" if skip_missing else ", leave these files out, or pass --skip-missing"
        raise DataError(
            f"{len(lines)} of {len(found)} evaluations lack their manifest. Make them with `chatreid parse`{advice}:\n"
            + "\n".join(lines)
        )
    for line in lines:
        say(f"Skipped, as its manifest does not exist:{line[1:]}", aside=True)
    return [one for path, one in zip(configs, found, strict=True) if not missing[path]]


def _refuse_shared_folders(configs: Sequence[Path], evaluations: Sequence[EvalSettings]) -> None:
    owners: dict[Path, Path] = {}
    for path, one in zip(configs, evaluations, strict=True):
        folder = one.output.output_dir
        if folder.resolve() in owners:
            raise ConfigError(
                f"{owners[folder.resolve()]} and {path} both write into {folder}. Give each an output.output_dir of "
                "its own: {file} in it stands for the file's name, as in output.output_dir=results/mine/{file}."
            )
        owners[folder.resolve()] = path


def run_evaluations(evaluations: Sequence[EvalSettings], processes: Processes) -> list[Results]:
    """Run one evaluation after another; a checkpoint stays loaded as long as the next one asks the same.

    Raises:
        ConfigError, DataError, UpstreamError: see ``run_evaluation``; what came before it is finished and stays.
    """
    models, results = Models(), list[Results]()
    for number, settings in enumerate(evaluations, start=1):
        if len(evaluations) > 1 and processes.is_first:
            say(f"Evaluation {number} of {len(evaluations)}, into {settings.output.output_dir}", aside=True)
        results.append(run_evaluation(settings, processes, models))
    return results


def compare_evaluations(evaluations: Sequence[EvalSettings]) -> tuple[list[Run], Path]:
    """Write the page of `chatreid report` about finished evaluations; return them, and the folder beside theirs."""
    folders = [settings.output.output_dir for settings in evaluations]
    if len({folder.is_absolute() for folder in folders}) > 1:
        folders = [folder.absolute() for folder in folders]
    page = Path(os.path.commonpath(folders)) / "comparison"
    return write_comparison(folders, page), page


def describe_plan(settings: EvalSettings) -> str:
    """Say how much an evaluation would do; reads the manifest, extracts no features, writes nothing."""
    if settings.data.splits:
        trial = settings.data.splits[0]
        first = describe_plan(choose_split(settings, trial))
        remarks = "".join(f"\nWarning: {remark}" for remark in list_shared_parts(settings))
        return f"{len(settings.data.splits)} splits; split {trial}:\n{first}{remarks}"
    benchmark = load_benchmark(settings.data, opens_images=settings.opens_images)
    gallery = len(benchmark.gallery)
    trials = benchmark.trial_galleries
    sizes = [len(places) for places in trials]
    top_k = None if settings.filter.source == "none" else settings.filter.top_k
    most = gallery if top_k is None else min(gallery, sum(min(top_k, size) for size in sizes))
    several = f" in {len(trials)} trials of {min(sizes):,} to {max(sizes):,}" if len(trials) > 1 else ""
    if settings.scoring.reads_scores:
        most = gallery
    saved = "Saved scores are ranked; no model is asked."
    cost = saved if settings.scoring.saved_scores else describe_cost(settings.scoring, most, len(benchmark.queries))
    cautions = "".join(f"Warning: {caution}\n" for caution in benchmark.cautions)
    return (
        f"{benchmark.name} ({benchmark.variant}): {len(benchmark.queries):,} queries "
        f"({len(benchmark.skipped):,} skipped), {gallery:,} gallery images{several}, at most "
        f"{most * len(benchmark.queries):,} pairs to score with backend {settings.scoring.backend}.\n"
        f"{cost}\n"
        f"{_describe_hours(settings, most * len(benchmark.queries))}"
        f"{cautions}"
        f"Results would go to {settings.output.output_dir}. Nothing was written; neither a checkpoint nor a server "
        "was tried."
    )


def _describe_hours(settings: EvalSettings, pairs: int) -> str:
    """Say how long so many pairs take, as far as that can be told before one is scored; a whole line or nothing."""
    if not settings.scoring.asks_model or settings.scoring.saved_scores:
        return ""
    limits = settings.filter
    fewer = "" if limits.source == "none" or limits.tau == -1 else ", or fewer, as tau leaves out what is unlike"
    return (
        f"That takes {pairs / 360_000:,.1f} hours at 100 pairs a second and {pairs / 3_600_000:,.1f} at 1,000{fewer}; "
        "the bar of a run shows its own speed and the time that is left after the first query.\n"
    )

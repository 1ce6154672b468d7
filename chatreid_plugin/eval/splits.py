"""A benchmark's published splits (``data.splits``), an evaluation each, and the mean of their results."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .backends.base import rank_weakness
from .loader import check_split
from .measure import Measured, average_metrics, average_recalls
from .report import Results
from .settings import EvalSettings


def list_manifests(settings: EvalSettings) -> dict[int, Path]:
    """Return the manifest of each of ``splits`` by its number, or the only one as that of split 0."""
    name = str(settings.data.manifest)
    return {trial: Path(name.replace("{trial}", str(trial))) for trial in settings.data.splits or (0,)}


def choose_splits(settings: EvalSettings) -> list[EvalSettings]:
    """Return the settings of each of ``splits``, all of whose manifests and models are there: the first takes hours.

    Raises:
        ConfigError: the folder of a split's model is missing.
        DataError: a split's manifest is missing, or holds another split.
    """
    parts = [choose_split(settings, trial) for trial in settings.data.splits]
    missing = [trial for trial, manifest in list_manifests(settings).items() if not manifest.is_file()]
    if missing:
        raise DataError(
            f"Manifest {settings.data.manifest} does not exist for split {', '.join(map(str, missing))}. `chatreid "
            'parse` makes them (eval/README.md, "A model a split"), or choose among the splits, e.g. data.splits=[1].'
        )
    if settings.scoring.backend == "transformers" and not settings.scoring.saved_scores:
        # Imported here: torch takes seconds to load.
        from .backends.checkpoint import check_name

        for name in dict.fromkeys(part.model.model_name_or_path for part in parts):
            check_name("model.model_name_or_path", str(name), ' eval/README.md, "A model a split", trains them.')
    return parts


def list_shared_parts(settings: EvalSettings) -> tuple[str, ...]:
    """Warn, in words, of a model or features that all of ``splits`` share: trained on one, they know others' people.

    A public network (``filter: clip``) or colours know nobody, so they may be shared.
    """
    model, server, scoring = settings.model, settings.server, settings.scoring
    scorers: dict[str, dict[str, Any]] = {
        "transformers": {
            "model.model_name_or_path": model.model_name_or_path,
            "model.adapter_name_or_path": model.adapter_name_or_path,
        },
        "http": {"server.model": server.model, "server.base_url": server.base_url},
        "features": {"scoring.features": scoring.features},
        "scores": {"scoring.scores": scoring.scores},
    }
    filtered = {} if scoring.reads_scores else {"filter.features": settings.filter.features}
    remarks: list[str] = []
    for part in (scorers.get(scoring.backend, {}), filtered):
        named = {key: str(value) for key, value in part.items() if value is not None}
        if len(settings.data.splits) > 1 and named and not any("{trial}" in value for value in named.values()):
            what = ", ".join(f"{key}: {value}" for key, value in named.items())
            remarks.append(
                f"All {len(settings.data.splits)} splits are measured with the same {what}. A model that was trained "
                "on one split has seen people whom other splits test, and its mean is too high: train a model a "
                f"split, and put {{trial}} into {next(iter(named))}. One that was trained on none of them may be "
                "shared."
            )
    return tuple(remarks)


def choose_split(settings: EvalSettings, trial: int) -> EvalSettings:
    """Return the settings of one of ``splits``: its number for ``{trial}`` in every text, and a folder of its own.

    Raises:
        DataError: the manifest of that name holds another split.
    """
    folder = settings.output.output_dir / f"split{trial}"
    changes: dict[str, dict[str, Any]] = {
        name: {
            key: type(value)(str(value).replace("{trial}", str(trial)))
            for key, value in section
            if isinstance(value, str | Path)
        }
        for name, section in settings
    }
    changes["data"]["splits"] = ()
    changes["output"]["output_dir"] = folder
    check_split(changes["data"]["manifest"], trial)
    return settings.replace(**changes)


def _merge_cautions(cautions: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return what is to be said of all splits, each once; what only some have, with how many."""
    counts = Counter(text for texts in cautions for text in texts)
    total = len(cautions)
    return tuple(text if count == total else f"{text} ({count} of {total} splits)" for text, count in counts.items())


def average_splits(splits: Sequence[Results]) -> Results:
    """Return the unweighted mean of several splits' results.

    Valid queries, skipped ones and pairs are those of all splits; what else is no metric is the first one's,
    but for the confidence, which is the weakest one's.
    """
    measured = [one.measured for one in splits]
    baselines = [one.baseline for one in measured if one.baseline is not None]
    mean = Measured(
        ranking=average_metrics([one.ranking for one in measured], same_queries=False),
        strict=average_metrics([one.strict for one in measured], same_queries=False),
        ceiling=average_metrics([one.ceiling for one in measured], same_queries=False),
        baseline=average_metrics(baselines, same_queries=False) if baselines else None,
        recall=float(np.mean([one.recall for one in measured])),
        cut_tie_rate=float(np.mean([one.cut_tie_rate for one in measured])),
        recall_at=average_recalls([one.recall_at for one in measured]),
        trials=tuple(one.ranking for one in measured),
        doubt=next(filter(None, (one.doubt for one in measured)), ""),
    )
    first, mean_of = splits[0].benchmark, f"mean of {len(splits)} splits"
    variant = first.variant.replace(first.split, mean_of) if first.split else f"{first.variant}; {mean_of}"
    benchmark = replace(
        first,
        variant=variant,
        skipped=tuple(query for one in splits for query in one.benchmark.skipped),
        copied_queries=sum(one.benchmark.copied_queries for one in splits),
        unlike_published=next(filter(None, (one.benchmark.unlike_published for one in splits)), ""),
        cautions=_merge_cautions([one.benchmark.cautions for one in splits]),
    )
    return replace(
        splits[0],
        measured=mean,
        benchmark=benchmark,
        pairs=sum(one.pairs for one in splits),
        confidence=max(splits, key=lambda one: rank_weakness(one.confidence)).confidence,
        splits=tuple(splits),
        calibration=None,
    )

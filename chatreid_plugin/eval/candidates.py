"""What is to be scored: the protocol's queries, and for each the gallery images that the baseline filter keeps.

Images that ask for captions (``setting: image_to_text``) are asked the other way round, and the answers turned: the
question is of one caption and one image either way, and a model computes a caption once for all its images. So the
captions ask those images that kept them, and the scores are the very ones of ``text_to_image``: without a filter each
direction goes on with the scores that the other one saved.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.benchmark import Benchmark, Query
from ..datasets.matching import Labels, label_benchmark
from ..errors import DataError
from ..eval_settings import EvalSettings
from ..records import ImageRecord
from .arrays import IntArray, ScoreArray
from .backends.base import Scorer
from .backends.simple import Vectors
from .calibration import NO_THRESHOLD, Calibration, calibrate
from .distributed import Processes
from .external import Matrix, read_matrix
from .features import extract_protocol_features
from .filtering import filter_gallery, iterate_similarities
from .loader import check_split, load_benchmark
from .questions import describe_cost
from .scores import find_features


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be scored: the candidates of each query, and the baseline they come from.

    ``query_features`` (Q, D) and ``gallery_features`` (G, D) are None without a filter. ``trial_candidates`` has, for
    each trial, Q arrays of gallery indices; ``kept`` has for each query those of all its trials, once each and
    ascending, so that a pair that occurs in several trials is scored once. A protocol without trials keeps baseline
    order. ``matrix`` has the scores of every pair where they come from a file; then there are no candidates.
    ``scorer`` is set where the filter needed the scoring model (``filter: vlm``), ``calibration`` where it had to find
    its threshold (``tau: auto``).
    """

    protocol: Benchmark
    labels: Labels
    query_features: ScoreArray | None
    gallery_features: ScoreArray | None
    trial_candidates: list[list[IntArray]]
    kept: list[IntArray]
    matrix: Matrix | None = None
    scorer: Scorer | None = None
    calibration: Calibration | None = None

    @property
    def features(self) -> tuple[ScoreArray, ScoreArray] | None:
        """The filter's of the queries and of the gallery; None without a filter."""
        if self.query_features is None or self.gallery_features is None:
            return None
        return self.query_features, self.gallery_features

    def iterate_similarities(self) -> Iterator[ScoreArray] | None:
        """Yield each query's baseline similarities (G,); None without a filter, where no order is known."""
        if self.matrix is not None:
            return self.matrix.iterate_rows()
        return None if self.features is None else iterate_similarities(*self.features)

    def name_features(self) -> tuple[Vectors, Vectors] | None:
        """Return the filter's features by name; queries apart, as an image that is query and gallery may have two."""
        if self.features is None:
            return None
        asked = [query.query_id for query in self.protocol.queries]
        ranked = [record.image_id for record in self.protocol.gallery]
        sides = zip((asked, ranked), self.features, strict=True)
        queries, gallery = (dict(zip(names, features, strict=True)) for names, features in sides)
        return queries, gallery

    def list_images(self) -> list[ImageRecord]:
        """Return all that is looked at, once each: the queries' images and every query's candidates."""
        pictures = [query.image for query in self.protocol.queries if query.image is not None]
        pictures += [self.protocol.gallery[index] for index in np.unique(np.concatenate(self.kept)).tolist()]
        return list({record.image_id: record for record in pictures}.values())

    def list_candidates(self, query: int) -> list[ImageRecord]:
        """Return the gallery images to score for a query, as ``kept``."""
        return [self.protocol.gallery[index] for index in self.kept[query].tolist()]

    def share_scores(self, scores: Sequence[ScoreArray]) -> list[list[ScoreArray]]:
        """Return for each trial the scores of its candidates, out of the scores of ``kept``."""
        if not self.protocol.trials:
            return [list(scores)]
        return [
            [
                values[np.searchsorted(kept, chosen)]
                for values, kept, chosen in zip(scores, self.kept, candidates, strict=True)
            ]
            for candidates in self.trial_candidates
        ]


def make_plan(settings: EvalSettings, processes: Processes | None = None, saved: Scorer | None = None) -> Plan:
    """Load the protocol and run the filter; several processes share the work of extracting its features.

    Args:
        settings: the evaluation.
        processes: those that take part.
        saved: stands in for the scoring model, with ``saved_scores``.

    Raises:
        ConfigError: a filter that compares images, and queries without an image.
    """
    protocol = load_benchmark(settings)
    if not settings.reads_scores:
        return filter_protocol(settings, protocol, processes or Processes(), saved)
    nothing = [np.empty(0, dtype=np.int64) for _ in protocol.queries]
    matrix, trials = read_matrix(settings, protocol), [nothing for _ in protocol.trial_galleries]
    return Plan(protocol, label_benchmark(protocol), None, None, trials, nothing, matrix)


def filter_protocol(
    settings: EvalSettings, protocol: Benchmark, processes: Processes, saved: Scorer | None = None
) -> Plan:
    """Return what the filter keeps of a protocol; without one, everything that is not ignored."""
    labels = label_benchmark(protocol)
    if settings.filter == "none":
        trials = [_keep_all(labels, places, len(protocol.queries)) for places in protocol.trial_galleries]
        return Plan(protocol, labels, None, None, trials, _merge_trials(protocol, trials))
    scorer: Scorer | None = None
    if saved is not None and settings.filter == "vlm":
        queries, gallery, calibration = find_features(settings, protocol, saved.fingerprint, processes)
    else:
        scorer, queries, gallery, calibration = _compute_features(settings, protocol, processes)
    tau = settings.tau if calibration is None else calibration.tau
    limits = (NO_THRESHOLD if tau == "auto" else tau), settings.top_k, settings.floor
    trials: list[list[IntArray]] = []
    for places in protocol.trial_galleries:
        find_ignored = labels.take_gallery(places).find_ignored
        trials.append([places[found] for found in filter_gallery(queries, gallery[places], find_ignored, *limits)])
    kept = _merge_trials(protocol, trials)
    return Plan(protocol, labels, queries, gallery, trials, kept, scorer=scorer, calibration=calibration)


def _keep_all(labels: Labels, places: IntArray, queries: int) -> list[IntArray]:
    """Return for each query the gallery indices of one trial that are not ignored."""
    inside = labels.take_gallery(places)
    ignored = (inside.find_ignored(query) for query in range(queries))
    return [places[~mask] if mask.any() else places for mask in ignored]


def _merge_trials(protocol: Benchmark, trials: Sequence[Sequence[IntArray]]) -> list[IntArray]:
    """Return each query's candidates in all trials, once each, as ``Plan.kept``."""
    if not protocol.trials:
        return list(trials[0])
    return [np.unique(np.concatenate(one)) for one in zip(*trials, strict=True)]


def _compute_features(
    settings: EvalSettings, protocol: Benchmark, processes: Processes
) -> tuple[Scorer | None, ScoreArray, ScoreArray, Calibration | None]:
    """Return the scoring model, if the filter needs it, the features (Q, D) and (G, D), and the threshold found."""
    scorer = pool_images = pool_apart = None
    if settings.filter == "vlm":
        # Imported here: torch takes seconds to load.
        from .backends.transformers import TransformersScorer

        scorer = TransformersScorer(settings, protocol.image_root)
        asked = [query.image for query in protocol.queries if query.image is not None]
        pool_images = partial(scorer.pool_images, planned=[*asked, *protocol.gallery])
        pool_apart = scorer.pool_apart
    calibration = calibrate(settings, protocol, processes, pool_apart) if settings.tau == "auto" else None
    return scorer, *extract_protocol_features(settings, protocol, processes, pool_images), calibration


def describe_plan(settings: EvalSettings) -> str:
    """Say how much an evaluation would do; reads the manifest, extracts no features, writes nothing."""
    if settings.splits:
        trial = settings.splits[0]
        first = describe_plan(choose_split(settings, trial))
        remarks = "".join(f"\nWarning: {remark}" for remark in list_shared_parts(settings))
        return f"{len(settings.splits)} splits; split {trial}:\n{first}{remarks}"
    protocol = load_benchmark(settings)
    gallery = len(protocol.gallery)
    trials = protocol.trial_galleries
    sizes = [len(places) for places in trials]
    unlimited = settings.filter == "none" or settings.top_k is None
    most = gallery if unlimited else min(gallery, sum(min(settings.top_k or gallery, size) for size in sizes))
    several = f" in {len(trials)} trials of {min(sizes):,} to {max(sizes):,}" if len(trials) > 1 else ""
    if settings.reads_scores:
        most = gallery
    saved = "Saved scores are ranked; no model is asked."
    cost = saved if settings.saved_scores else describe_cost(settings, most, len(protocol.queries))
    cautions = "".join(f"Warning: {caution}\n" for caution in protocol.cautions)
    return (
        f"{protocol.name} ({protocol.variant}): {len(protocol.queries):,} queries "
        f"({len(protocol.skipped):,} skipped), {gallery:,} gallery images{several}, at most "
        f"{most * len(protocol.queries):,} pairs to score with backend {settings.backend}.\n"
        f"{cost}\n"
        f"{_describe_hours(settings, most * len(protocol.queries))}"
        f"{cautions}"
        f"Results would go to {settings.output_dir}. Nothing was written; neither a checkpoint nor a server was tried."
    )


def _describe_hours(settings: EvalSettings, pairs: int) -> str:
    """Say how long so many pairs take, as far as that can be told before one is scored; a whole line or nothing."""
    if not settings.asks_model or settings.saved_scores:
        return ""
    fewer = "" if settings.filter == "none" or settings.tau == -1 else ", or fewer, as tau leaves out what is unlike"
    return (
        f"That takes {pairs / 360_000:,.1f} hours at 100 pairs a second and {pairs / 3_600_000:,.1f} at 1,000{fewer}; "
        "the bar of a run shows its own speed and the time that is left after the first query.\n"
    )


def choose_splits(settings: EvalSettings) -> list[EvalSettings]:
    """Return the settings of each of ``splits``, all of whose manifests and models are there: the first takes hours.

    Raises:
        ConfigError: the folder of a split's model is missing.
        DataError: a split's manifest is missing, or holds another split.
    """
    parts = [choose_split(settings, trial) for trial in settings.splits]
    missing = [trial for trial, part in zip(settings.splits, parts, strict=True) if not part.manifest.is_file()]
    if missing:
        raise DataError(
            f"Manifest {settings.manifest} does not exist for split {', '.join(map(str, missing))}. `chatreid parse` "
            'makes them (eval/README.md, "A model a split"), or choose among the splits, e.g. splits=[1].'
        )
    if settings.backend == "transformers" and not settings.saved_scores:
        # Imported here: torch takes seconds to load.
        from .backends.checkpoint import check_name

        for name in dict.fromkeys(part.model_name_or_path for part in parts):
            check_name("model_name_or_path", str(name), ' eval/README.md, "A model a split", trains them.')
    return parts


def list_shared_parts(settings: EvalSettings) -> tuple[str, ...]:
    """Warn, in words, of a model or features that all of ``splits`` share: trained on one, they know others' people.

    A public network (``filter: clip``) or colours know nobody, so they may be shared.
    """
    keys = {
        "transformers": ("model_name_or_path", "adapter_name_or_path"),
        "http": ("model", "base_url"),
        "features": ("features",),
        "scores": ("scores",),
    }
    parts = [keys.get(settings.backend, ()), () if settings.reads_scores else ("filter_features",)]
    remarks: list[str] = []
    for part in parts:
        named = {key: str(value) for key in part if (value := getattr(settings, key)) is not None}
        if len(settings.splits) > 1 and named and not any("{trial}" in value for value in named.values()):
            what = ", ".join(f"{key}: {value}" for key, value in named.items())
            remarks.append(
                f"All {len(settings.splits)} splits are measured with the same {what}. A model that was trained on "
                "one split has seen people whom other splits test, and its mean is too high: train a model a split, "
                f"and put {{trial}} into {next(iter(named))}. One that was trained on none of them may be shared."
            )
    return tuple(remarks)


def choose_split(settings: EvalSettings, trial: int) -> EvalSettings:
    """Return the settings of one of ``splits``: its number for ``{trial}`` in every text, and a folder of its own.

    Raises:
        DataError: the manifest of that name holds another split.
    """
    changes: dict[str, Any] = {"output_dir": settings.output_dir / f"split{trial}", "splits": ()}
    for key, value in settings:
        if key not in changes and isinstance(value, str | Path):
            changes[key] = type(value)(str(value).replace("{trial}", str(trial)))
    check_split(changes.get("manifest", settings.manifest), trial)
    return settings.model_copy(update=changes)


def turn_plan(plan: Plan) -> Plan:
    """Return the plan in which the captions that images rank ask those images."""
    protocol = plan.protocol
    captions = [Query(record.image_id, record.person_id, text=record.captions[0]) for record in protocol.gallery]
    images = [query.image for query in protocol.queries if query.image is not None]
    asked = replace(protocol, queries=captions, gallery=images, ranks_captions=False)
    kept = _turn_lists(plan.kept, len(captions))
    features = plan.gallery_features, plan.query_features
    return Plan(asked, label_benchmark(asked), *features, [kept], kept, scorer=plan.scorer)


def _ranks_everything(kept: Sequence[IntArray], size: int) -> bool:
    """Return whether every list has every number in order; then they are turned without sorting all pairs."""
    everything = np.arange(size)
    return all(len(one) == size and np.array_equal(one, everything) for one in kept)


def _sort_pairs(kept: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
    """Return the order (P,) of all pairs by what is kept, and then by who keeps it; and the latter in this order."""
    keepers = np.repeat(np.arange(len(kept)), [len(one) for one in kept])
    order = np.argsort(np.concatenate(kept), kind="stable")
    return order, keepers[order]


def _turn_lists(kept: Sequence[IntArray], size: int) -> list[IntArray]:
    """Return for each of ``size`` numbers the lists that have it, ascending."""
    if _ranks_everything(kept, size):
        return [np.arange(len(kept))] * size
    _, keepers = _sort_pairs(kept)
    counts = np.bincount(np.concatenate(kept), minlength=size)
    return np.split(keepers, np.cumsum(counts)[:-1])


def turn_scores(plan: Plan, scores: Sequence[ScoreArray]) -> list[ScoreArray]:
    """Return for each image the scores (K,) of the captions it keeps, out of those of the turned plan's queries."""
    if _ranks_everything(plan.kept, len(scores)):
        return list(np.stack(scores, axis=1))
    order, _ = _sort_pairs(plan.kept)
    turned = np.empty(len(order), dtype=np.float32)
    turned[order] = np.concatenate(scores)
    return np.split(turned, np.cumsum([len(one) for one in plan.kept])[:-1])

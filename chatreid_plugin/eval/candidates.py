"""What is to be scored: the benchmark's queries, and for each the gallery images that the baseline filter keeps.

Images that ask for captions (``setting: image_to_text``) are asked the other way round, and the answers turned: the
question is of one caption and one image either way, and a model computes a caption once for all its images. So the
captions ask those images that kept them, and the scores are the very ones of ``text_to_image``: without a filter each
direction goes on with the scores that the other one saved.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..archives import IntArray, ScoreArray
from ..datasets.benchmark import Benchmark, Query
from ..datasets.matching import Labels, label_benchmark
from ..records import ImageRecord
from .backends import Models
from .backends.base import Scorer
from .backends.files import Matrix, Vectors, read_matrix
from .calibration import NO_THRESHOLD, Calibration, calibrate
from .distributed import Processes
from .filter import extract_benchmark_features, filter_gallery, iterate_similarities
from .loader import load_benchmark
from .scores import find_features
from .settings import DataSettings, EvalSettings, FilterSettings, RankSettings


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be scored: the candidates of each query, and the baseline they come from.

    ``features`` are the filter's of the queries (Q, D) and of the gallery (G, D); None without a filter.
    ``trial_candidates`` has, for each trial, Q arrays of gallery indices; ``kept`` has for each query those of all its
    trials, once each and ascending, so that a pair that occurs in several trials is scored once. A benchmark without
    trials keeps baseline order. ``matrix`` has the scores of every pair where they come from a file; then there are no
    candidates. ``scorer`` is set where the filter needed the scoring model (``filter: vlm``), ``calibration`` where it
    had to find its threshold (``tau: auto``).
    """

    benchmark: Benchmark
    labels: Labels
    features: tuple[ScoreArray, ScoreArray] | None
    trial_candidates: list[list[IntArray]]
    kept: list[IntArray]
    matrix: Matrix | None = None
    scorer: Scorer | None = None
    calibration: Calibration | None = None

    @property
    def has_tail(self) -> bool:
        """Whether images are ranked that have no score: the filter left them out, or a file lacks them."""
        return self.features is not None or (self.matrix is not None and self.matrix.may_lack)

    def iterate_similarities(self) -> Iterator[ScoreArray] | None:
        """Yield each query's baseline similarities (G,); None without a filter, where no order is known."""
        if self.matrix is not None:
            return self.matrix.iterate_rows()
        return None if self.features is None else iterate_similarities(*self.features)

    def name_features(self) -> tuple[Vectors, Vectors] | None:
        """Return the filter's features by name; queries apart, as an image that is query and gallery may have two."""
        if self.features is None:
            return None
        asked = [query.query_id for query in self.benchmark.queries]
        ranked = [record.image_id for record in self.benchmark.gallery]
        sides = zip((asked, ranked), self.features, strict=True)
        queries, gallery = (dict(zip(names, features, strict=True)) for names, features in sides)
        return queries, gallery

    def list_images(self) -> list[ImageRecord]:
        """Return all that is looked at, once each: the queries' images and every query's candidates."""
        pictures = [query.image for query in self.benchmark.queries if query.image is not None]
        pictures += [self.benchmark.gallery[index] for index in np.unique(np.concatenate(self.kept)).tolist()]
        return list({record.image_id: record for record in pictures}.values())

    def list_candidates(self, query: int) -> list[ImageRecord]:
        """Return the gallery images to score for a query, as ``kept``."""
        return [self.benchmark.gallery[index] for index in self.kept[query].tolist()]

    def share_scores(self, scores: Sequence[ScoreArray]) -> list[list[ScoreArray]]:
        """Return for each trial the scores of its candidates, out of the scores of ``kept``."""
        if not self.benchmark.trials:
            return [list(scores)]
        return [
            [
                values[np.searchsorted(kept, chosen)]
                for values, kept, chosen in zip(scores, self.kept, candidates, strict=True)
            ]
            for candidates in self.trial_candidates
        ]


def make_plan(
    settings: EvalSettings,
    processes: Processes | None = None,
    saved: Scorer | None = None,
    models: Models | None = None,
) -> Plan:
    """Load the benchmark and run the filter; several processes share the work of extracting its features.

    Args:
        settings: the evaluation.
        processes: those that take part.
        saved: stands in for the scoring model, with ``saved_scores``.
        models: where the scoring model is, or is kept for the next evaluation.

    Raises:
        ConfigError: a filter that compares images, and queries without an image.
    """
    processes = processes or Processes()
    benchmark = load_benchmark(settings.data, opens_images=settings.opens_images)
    if settings.scoring.reads_scores:
        nothing = [np.empty(0, dtype=np.int64) for _ in benchmark.queries]
        matrix, trials = read_matrix(settings.scoring, benchmark), [nothing for _ in benchmark.trial_galleries]
        return Plan(benchmark, label_benchmark(benchmark), None, trials, nothing, matrix)
    if saved is not None and settings.filter.source == "vlm":
        features, calibration = find_features(settings, benchmark, saved.fingerprint, processes)
        return _keep_similar(settings.filter, benchmark, features, calibration)
    return filter_benchmark(settings, benchmark, processes, models or Models(), settings.data)


def filter_benchmark(
    settings: RankSettings,
    benchmark: Benchmark,
    processes: Processes,
    models: Models,
    data: DataSettings | None = None,
) -> Plan:
    """Return what the filter keeps of a benchmark; without one, everything that is not ignored.

    ``data`` has the training identities for ``tau: auto``; without it there is no threshold.
    """
    if settings.filter.source == "none":
        labels = label_benchmark(benchmark)
        trials = [_keep_all(labels, places, len(benchmark.queries)) for places in benchmark.trial_galleries]
        return Plan(benchmark, labels, None, trials, _merge_trials(benchmark, trials))
    scorer = pool_images = pool_apart = calibration = None
    if settings.filter.source == "vlm":
        scorer = models.make_scorer(settings, benchmark.image_root)
        asked = [query.image for query in benchmark.queries if query.image is not None]
        pool_images = partial(scorer.pool_images, planned=[*asked, *benchmark.gallery])
        pool_apart = scorer.pool_apart
    extract = partial(extract_benchmark_features, settings.filter, settings.model.device)
    if settings.filter.tau == "auto" and data is not None:
        # Each process computes all of it: shares would have to meet again, and it is little.
        own = partial(extract, processes=Processes(), pool_images=pool_apart)
        given = benchmark, processes, own
        calibration = calibrate(data, settings.filter.recall, *given, opens_images=settings.opens_images)
    features = extract(benchmark, processes, pool_images)
    return _keep_similar(settings.filter, benchmark, features, calibration, scorer)


def _keep_similar(
    limits: FilterSettings,
    benchmark: Benchmark,
    features: tuple[ScoreArray, ScoreArray],
    calibration: Calibration | None,
    scorer: Scorer | None = None,
) -> Plan:
    """Return the plan with what is similar enough to each query; ``features`` are (Q, D) and (G, D)."""
    queries, gallery = features
    labels, tau = label_benchmark(benchmark), limits.tau if calibration is None else calibration.tau
    most = (NO_THRESHOLD if tau == "auto" else tau), limits.top_k, limits.floor
    trials: list[list[IntArray]] = []
    for places in benchmark.trial_galleries:
        find_ignored = labels.take_gallery(places).find_ignored
        trials.append([places[found] for found in filter_gallery(queries, gallery[places], find_ignored, *most)])
    kept = _merge_trials(benchmark, trials)
    return Plan(benchmark, labels, features, trials, kept, scorer=scorer, calibration=calibration)


def _keep_all(labels: Labels, places: IntArray, queries: int) -> list[IntArray]:
    """Return for each query the gallery indices of one trial that are not ignored."""
    inside = labels.take_gallery(places)
    ignored = (inside.find_ignored(query) for query in range(queries))
    return [places[~mask] if mask.any() else places for mask in ignored]


def _merge_trials(benchmark: Benchmark, trials: Sequence[Sequence[IntArray]]) -> list[IntArray]:
    """Return each query's candidates in all trials, once each, as ``Plan.kept``."""
    if not benchmark.trials:
        return list(trials[0])
    return [np.unique(np.concatenate(one)) for one in zip(*trials, strict=True)]


def turn_plan(plan: Plan) -> Plan:
    """Return the plan in which the captions that images rank ask those images."""
    benchmark = plan.benchmark
    captions = [Query(record.image_id, record.person_id, text=record.captions[0]) for record in benchmark.gallery]
    images = [query.image for query in benchmark.queries if query.image is not None]
    asked = replace(benchmark, queries=captions, gallery=images, ranks_captions=False)
    kept = _turn_lists(plan.kept, len(captions))
    features = None if plan.features is None else (plan.features[1], plan.features[0])
    return Plan(asked, label_benchmark(asked), features, [kept], kept, scorer=plan.scorer)


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

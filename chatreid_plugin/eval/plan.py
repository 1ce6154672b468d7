"""What is to be scored: the protocol's queries, and for each the gallery images that the baseline filter keeps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..eval_settings import EvalSettings
from ..records import ImageRecord
from .arrays import IntArray, ScoreArray
from .backends import Scorer, Vectors
from .external import Matrix, read_matrix, read_protocol_features
from .features import PoolImages, extract_features, form_batches
from .filtering import filter_gallery, iterate_similarities
from .modes import describe_cost
from .processes import Processes
from .prompts import describe_in_words
from .protocols import Labels, Protocol, label_protocol, load_protocol


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be scored: the candidates of each query, and the baseline they come from.

    ``query_features`` (Q, D) and ``gallery_features`` (G, D) are None without a filter. ``trial_candidates`` has, for
    each trial, Q arrays of gallery indices; ``kept`` has for each query those of all its trials, once each and
    ascending, so that a pair that occurs in several trials is scored once. A protocol without trials keeps baseline
    order. ``matrix`` has the scores of every pair where they come from a file; then there are no candidates.
    ``scorer`` is set where the filter needed the scoring model (``filter: vlm``).
    """

    protocol: Protocol
    labels: Labels
    query_features: ScoreArray | None
    gallery_features: ScoreArray | None
    trial_candidates: list[list[IntArray]]
    kept: list[IntArray]
    matrix: Matrix | None = None
    scorer: Scorer | None = None

    def iterate_similarities(self) -> Iterator[ScoreArray] | None:
        """Yield each query's baseline similarities (G,); None without a filter, where no order is known."""
        if self.matrix is not None:
            return self.matrix.iterate_rows()
        if self.query_features is None or self.gallery_features is None:
            return None
        return iterate_similarities(self.query_features, self.gallery_features)

    def name_features(self) -> tuple[Vectors, Vectors] | None:
        """Return the filter's features by name; queries apart, as an image that is query and gallery may have two."""
        if self.query_features is None or self.gallery_features is None:
            return None
        asked = [query.query_id for query in self.protocol.queries]
        ranked = [record.image_id for record in self.protocol.gallery]
        sides = ((asked, self.query_features), (ranked, self.gallery_features))
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


def make_plan(settings: EvalSettings, processes: Processes | None = None) -> Plan:
    """Load the protocol and run the filter; several processes share the work of extracting its features.

    Raises:
        ConfigError: a filter that compares images, and queries without an image.
    """
    protocol = load_protocol(settings)
    if not settings.reads_scores:
        return filter_protocol(settings, protocol, processes or Processes())
    nothing = [np.empty(0, dtype=np.int64) for _ in protocol.queries]
    matrix, trials = read_matrix(settings, protocol), [nothing for _ in protocol.trial_galleries]
    return Plan(protocol, label_protocol(protocol), None, None, trials, nothing, matrix)


def filter_protocol(settings: EvalSettings, protocol: Protocol, processes: Processes) -> Plan:
    """Return what the filter keeps of a protocol; without one, everything that is not ignored."""
    labels = label_protocol(protocol)
    scorer = pool_images = None
    if settings.filter == "vlm":
        # Imported here: torch takes seconds to load.
        from .backends.transformers import TransformersScorer

        scorer = TransformersScorer(settings, protocol.image_root)
        asked = [query.image for query in protocol.queries if query.image is not None]
        pool_images = partial(scorer.pool_images, planned=[*asked, *protocol.gallery])
    features = None if settings.filter == "none" else _extract(settings, protocol, processes, pool_images)
    count = len(protocol.queries)
    trials: list[list[IntArray]] = []
    for places in protocol.trial_galleries:
        inside = labels.take_gallery(places)
        if features is None:
            everything = np.arange(len(places))
            ignored = (inside.find_ignored(query) for query in range(count))
            found = [np.flatnonzero(~mask) if mask.any() else everything for mask in ignored]
        else:
            limits = settings.tau, settings.top_k, settings.floor
            found = filter_gallery(features[:count], features[count:][places], inside.find_ignored, *limits)
        trials.append([places[indices] for indices in found])
    kept = trials[0]
    if protocol.trials:
        kept = [np.unique(np.concatenate(one)) for one in zip(*trials, strict=True)]
    halves = (None, None) if features is None else (features[:count], features[count:])
    return Plan(protocol, labels, *halves, trials, kept, scorer=scorer)


def _extract(
    settings: EvalSettings, protocol: Protocol, processes: Processes, pool_images: PoolImages | None
) -> ScoreArray:
    if settings.filter == "npz" and settings.filter_features is not None:
        return np.concatenate(read_protocol_features(settings.filter_features, protocol))
    asked = [describe_in_words(query) if query.image is None else query.image for query in protocol.queries]
    ranked = [record.captions[0] if protocol.ranks_captions else record for record in protocol.gallery]
    items = [*asked, *ranked]
    batches = form_batches(items)
    share = processes.take_share(batches) if len(batches) >= processes.count else batches
    own = [items[place] for batch in share for place in batch]
    found = np.concatenate(processes.gather(extract_features(own, protocol.image_root, settings, pool_images)))
    features = np.empty((len(items), found.shape[1]), dtype=np.float32)
    features[np.concatenate(batches)] = found[: len(items)]  # of fewer batches than processes everyone took all
    return features


def describe_plan(settings: EvalSettings) -> str:
    """Say how much an evaluation would do; reads the manifest, extracts no features, writes nothing."""
    if settings.splits:
        trial = settings.splits[0]
        first = describe_plan(choose_split(settings, trial))
        remarks = "".join(f"\nWarning: {remark}" for remark in list_shared_parts(settings))
        return f"{len(settings.splits)} splits; split {trial}:\n{first}{remarks}"
    protocol = load_protocol(settings)
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
        f"{cautions}"
        f"Results would go to {settings.output_dir}. Nothing was written; neither a checkpoint nor a server was tried."
    )


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
    """Return the settings of one of ``splits``: its number for ``{trial}`` in every text, and a folder of its own."""
    changes: dict[str, Any] = {"output_dir": settings.output_dir / f"split{trial}", "splits": ()}
    for key, value in settings:
        if key not in changes and isinstance(value, str | Path):
            changes[key] = type(value)(str(value).replace("{trial}", str(trial)))
    return settings.model_copy(update=changes)

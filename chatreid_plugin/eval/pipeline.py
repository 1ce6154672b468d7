"""An evaluation from settings to files: protocol, filter, scorer, store, ranking, metrics, report, in this order."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from .. import __version__, tasks
from ..config import EvalSettings
from ..errors import UpstreamError
from ..records import ImageRecord
from .backends import Scorer, make_scorer
from .filtering import extract_features, filter_gallery, iterate_similarities
from .html import build_query_view, write_page
from .metrics import RankingMetrics, evaluate_ranking
from .protocols import Labels, Protocol, label_protocol, load_protocol
from .ranking import iterate_rows, measure_recall, order_gallery, score_perfectly
from .report import Results, build_ranking_row, write_rankings, write_results
from .store import ScoreStore
from .ties import IntArray


ScoreArray = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be scored: the candidates of each query, and the baseline they come from.

    ``query_features`` (Q, D) and ``gallery_features`` (G, D) are None without a filter; ``kept`` has Q index arrays.
    """

    protocol: Protocol
    labels: Labels
    query_features: ScoreArray | None
    gallery_features: ScoreArray | None
    kept: list[IntArray]

    def iterate_similarities(self) -> Iterator[ScoreArray]:
        """Yield each query's baseline similarities (G,); zeros without a filter, where no order is known."""
        if self.query_features is None or self.gallery_features is None:
            zeros = np.zeros(len(self.protocol.gallery), dtype=np.float32)
            return (zeros for _ in self.protocol.queries)
        return iterate_similarities(self.query_features, self.gallery_features)

    def list_candidates(self, query: int) -> list[ImageRecord]:
        """Return the gallery images to score for a query, in baseline order."""
        return [self.protocol.gallery[index] for index in self.kept[query].tolist()]


def make_plan(settings: EvalSettings) -> Plan:
    """Load the protocol and run the filter."""
    protocol = load_protocol(settings)
    labels = label_protocol(protocol)
    if settings.filter == "none":
        kept = [np.flatnonzero(~labels.find_ignored(query)) for query in range(len(protocol.queries))]
        return Plan(protocol, labels, None, None, kept)
    features = extract_features([*protocol.queries, *protocol.gallery], protocol.image_root, settings)
    count = len(protocol.queries)
    kept = filter_gallery(
        features[:count], features[count:], labels.find_ignored, settings.tau, settings.top_k, settings.floor
    )
    return Plan(protocol, labels, features[:count], features[count:], kept)


def describe_plan(settings: EvalSettings) -> str:
    """Say how much an evaluation would do; reads the manifest, extracts no features, writes nothing."""
    protocol = load_protocol(settings)
    gallery = len(protocol.gallery)
    most = gallery if settings.filter == "none" or settings.top_k is None else min(settings.top_k, gallery)
    return (
        f"{protocol.name} ({protocol.variant}): {len(protocol.queries):,} queries "
        f"({len(protocol.skipped):,} skipped), {gallery:,} gallery images, at most "
        f"{most * len(protocol.queries):,} pairs to score with backend {settings.backend}.\n"
        f"Results would go to {settings.output_dir}. Nothing was written."
    )


def describe_fingerprint(settings: EvalSettings, scorer: Scorer) -> dict[str, Any]:
    """Return everything that changes a pair's score, for the store."""
    fingerprint: dict[str, Any] = {"backend": settings.backend, "version": __version__}
    if settings.backend == "random":
        fingerprint["seed"] = settings.seed
    if settings.backend == "features":
        fingerprint |= {
            "filter": settings.filter,
            "filter_features": str(settings.filter_features),
            "filter_weights": str(settings.filter_weights),
        }
    if settings.backend == "transformers":
        task = tasks.TASKS[settings.task]
        fingerprint |= {
            "model_name_or_path": settings.model_name_or_path,
            "weights": getattr(scorer, "fingerprint", None),
            "dtype": settings.dtype,
            "mode": settings.mode,
            "prompt": tasks.format_chat_prompt(task.prompts[0]),
            "answers": [tasks.YES, tasks.NO],
            "chatreid_stage": settings.chatreid_stage,
            "chatreid_aspect": settings.chatreid_aspect,
            "image_max_pixels": settings.image_max_pixels,
            "image_min_pixels": settings.image_min_pixels,
        }
    return fingerprint


def _score_query(scorer: Scorer, query: ImageRecord, candidates: Sequence[ImageRecord]) -> ScoreArray:
    scores = np.asarray(scorer(query, candidates), dtype=np.float32)
    if scores.shape != (len(candidates),):
        raise UpstreamError(f"The scorer gave {scores.shape} scores for {len(candidates)} candidates of {query.path}.")
    if not np.isfinite(scores).all():
        wrong = candidates[int(np.flatnonzero(~np.isfinite(scores))[0])]
        raise UpstreamError(
            f"The scorer gave a NaN or infinite score for query {query.path} and {wrong.path}. "
            "The checkpoint is damaged, or its dtype overflows: try dtype=float32."
        )
    return scores


def score_queries(plan: Plan, scorer: Scorer, store: ScoreStore) -> list[ScoreArray]:
    """Return the scores (K,) of every query's candidates; queries already in the store are not scored again."""
    queries = plan.protocol.queries
    scores = [store.get(query, plan.list_candidates(index)) for index, query in enumerate(queries)]
    pending = [index for index, saved in enumerate(scores) if saved is None]
    if len(pending) < len(queries):
        finished = len(queries) - len(pending)
        logger.warning("%d of %d queries were scored before (%s).", finished, len(queries), store.path)
    prepare = getattr(scorer, "prepare", None)
    if pending and prepare is not None:
        needed = np.unique(np.concatenate([plan.kept[query] for query in pending]))
        indices: list[int] = needed.tolist()
        gallery = [plan.protocol.gallery[index] for index in indices]
        prepare([*(queries[index] for index in pending), *gallery])
    total = sum(len(indices) for indices in plan.kept)
    done = total - sum(len(plan.kept[index]) for index in pending)
    with tqdm(total=total, initial=done, desc="scoring", unit="pair", unit_scale=True) as progress:
        for index in pending:
            candidates = plan.list_candidates(index)
            values = _score_query(scorer, queries[index], candidates)
            store.add(queries[index], candidates, values)
            scores[index] = values
            progress.update(len(candidates))
    return [values for values in scores if values is not None]


def _measure(
    plan: Plan, scores: Sequence[ScoreArray], kept: Sequence[IntArray], *, strict: bool = False
) -> RankingMetrics:
    labels = plan.labels
    return evaluate_ranking(
        iterate_rows(kept, scores, plan.iterate_similarities()),
        labels.query_person,
        labels.gallery_person,
        labels.query_camera,
        labels.gallery_camera,
        ignore="same_camera" if labels.same_camera_ignored else None,
        average_precision=plan.protocol.average_precision,
        cmc=plan.protocol.cmc,
        retrieved=[len(indices) for indices in kept] if strict else None,
    )


def _measure_all(
    settings: EvalSettings, plan: Plan, scores: Sequence[ScoreArray], fingerprint: Mapping[str, Any], path: Path
) -> Results:
    baseline = None
    if settings.filter != "none":
        # No candidates at all: every image is in the tail, which is the baseline's order.
        count = len(plan.protocol.queries)
        baseline = _measure(plan, [np.empty(0, np.float32)] * count, [np.empty(0, np.int64)] * count)
    return Results(
        settings=settings,
        protocol=plan.protocol,
        ranking=_measure(plan, scores, plan.kept),
        strict=_measure(plan, scores, plan.kept, strict=True),
        ceiling=_measure(plan, score_perfectly(plan.kept, plan.labels), plan.kept),
        baseline=baseline,
        filter_recall=measure_recall(plan.kept, plan.labels),
        pairs=sum(len(indices) for indices in plan.kept),
        fingerprint=fingerprint,
        scores_path=path,
    )


def _write_rankings_and_page(results: Results, plan: Plan, scores: Sequence[ScoreArray]) -> None:
    """Write ``rankings.parquet`` and, worst average precision first, the page of ranked galleries."""
    precisions = dict(
        zip(results.ranking.query_indices.tolist(), results.ranking.average_precisions.tolist(), strict=True)
    )
    worst = sorted(precisions, key=lambda query: (precisions[query], query))[: results.settings.report_queries]
    shown = set(worst)
    rows: list[dict[str, Any]] = []
    views: dict[int, dict[str, Any]] = {}
    for query, similarities in enumerate(plan.iterate_similarities()):
        ignored, matches = plan.labels.find_ignored(query), plan.labels.find_positives(query)
        order = order_gallery(plan.kept[query], scores[query], similarities, ignored)
        rows.append(build_ranking_row(plan.protocol, query, order, plan.kept[query], scores[query], matches))
        if query in shown:
            views[query] = build_query_view(
                plan.protocol, query, order, plan.kept[query], scores[query], matches, precisions[query]
            )
    output = results.settings.output_dir
    write_rankings(output / "rankings.parquet", rows)
    write_page(output / "report.html", results, [views[query] for query in worst])


def run_evaluation(settings: EvalSettings) -> Results:
    """Run one evaluation and write its files into ``settings.output_dir``; finished queries are not scored again.

    Raises:
        ConfigError: settings that do not fit together.
        DataError: a missing manifest, image or feature, or no query with a match.
        UpstreamError: the model cannot be loaded or gives scores that are not numbers.
    """
    plan = make_plan(settings)
    features = None
    if plan.query_features is not None and plan.gallery_features is not None:
        records = [*plan.protocol.queries, *plan.protocol.gallery]
        vectors = [*plan.query_features, *plan.gallery_features]
        features = {record.image_id: vector for record, vector in zip(records, vectors, strict=True)}
    scorer = make_scorer(settings, plan.protocol, features)
    fingerprint = describe_fingerprint(settings, scorer)
    with ScoreStore(settings.output_dir, fingerprint, overwrite=settings.overwrite) as store:
        scores = score_queries(plan, scorer, store)
    results = _measure_all(settings, plan, scores, fingerprint, store.path)
    _write_rankings_and_page(results, plan, scores)
    write_results(results)
    return results

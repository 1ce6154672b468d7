"""The results of an evaluation and how they are written: ``results.json``, ``rankings.parquet``, a table and a page.

Last step of an evaluation. The page of ranked galleries is one HTML file with its pictures inside, which opens from
disk without a network; the worst queries come first, since they are what one looks for.
"""

import hashlib
import heapq
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .. import __version__
from ..archives import BoolArray, IntArray
from ..datasets.benchmark import RULES, Benchmark, Query
from ..html import embed_png, encode_png, render_template
from ..pixels import encode_thumbnail
from ..records import ImageRecord
from ..shards import read_json, write_json, write_text
from .backends.base import Confidence
from .calibration import Calibration
from .measure import CURVE_RANKS, Measured, Ranking, define_terms
from .metrics import RankingMetrics
from .settings import EvalSettings


TEMPLATE = Path(__file__).with_name("report.html.j2")
SHOWN = 10
RANKING_DEPTH = 100

# Of the mAP of a perfect re-ranker: below it the filter is warned of.
LEAST_CEILING = 0.99

# What tables quote of the CMC.
HEADLINE_RANKS = (1, 5, 10, 20)
PACKAGES = ("numpy", "pyarrow", "pillow", "torch", "torchvision", "transformers", "llamafactory")

# Of ``rankings.parquet``, one row a query.
RANKING_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("gallery_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("matches", pa.list_(pa.bool_())),
        ("average_precision", pa.float64()),
        ("inverse_negative_penalty", pa.float64()),
        ("first_match", pa.int64()),
    ]
)

# What a reader has to know of scores that are not the model's own margins (``backends.Confidence``).
WARNINGS = {
    "top_logprobs": "Scores come from the server's few best log-probabilities: where a word was not among them, "
    "the least likely one returned stands in for it.",
    "answers": "Scores are hard answers, not confidences: the server gives no log-probabilities. Images with the same "
    "share of votes tie, and ties count as the mean over every order.",
}


@dataclass(frozen=True, slots=True)
class Results:
    """Everything a finished evaluation knows.

    Attributes:
        settings: the evaluation.
        benchmark: queries, gallery, rules.
        measured: the metrics; ``ranking`` and so on are short for its fields.
        pairs: number of (query, gallery image) pairs scored.
        fingerprint: what the scores depend on.
        scores_path: the saved scores.
        confidence: what the scores are (``backends.Confidence``).
        splits: the results whose mean this is, if it is one; pairs and skipped queries are then those of all of them.
        remarks: what a reader has to know of this run, beside what the benchmark and the scores say of themselves.
        calibration: how ``tau: auto`` found the filter's threshold; None of a fixed one, and of a mean of splits.
    """

    settings: EvalSettings
    benchmark: Benchmark
    measured: Measured
    pairs: int
    fingerprint: Mapping[str, Any]
    scores_path: Path
    confidence: Confidence
    splits: tuple["Results", ...] = ()
    remarks: tuple[str, ...] = ()
    calibration: Calibration | None = None

    @property
    def scorer(self) -> str:
        """Who scored, for people: ``output.name``, or where the scores come from."""
        return self.settings.output.name or self.source

    @property
    def source(self) -> str:
        """Where the scores come from: the checkpoint, the server's model, another model's file, or the backend."""
        scoring = self.settings.scoring
        if scoring.backend == "transformers":
            return self.settings.model.title
        if scoring.backend == "http":
            return f"{self.fingerprint['model']} (http)"
        file = scoring.features or scoring.scores
        return f"{scoring.backend} {file}" if file is not None else scoring.backend

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader has to know before the figures are quoted."""
        scores = [WARNINGS[self.confidence]] if self.confidence in WARNINGS else []
        doubt = [self.measured.doubt] if self.measured.doubt else []
        return (*self.remarks, *self.benchmark.cautions, *self._describe_cap(), *doubt, *scores)

    def _describe_cap(self) -> list[str]:
        """Say that the filter lost matches which no scorer can win back, if it did."""
        limits, ceiling = self.settings.filter, self.ceiling.mean_ap
        if limits.source == "none" or ceiling >= LEAST_CEILING:
            return []
        return [
            f"The filter caps the result: it lost {100 * (1 - self.filter_recall):.1f} % of the matches, so that a "
            f"perfect re-ranker would reach mAP {100 * ceiling:.1f}. Raise filter.top_k ({limits.top_k or 'no cap'}) "
            f"or filter.recall ({limits.recall:g}), or choose a better filter.source ({limits.source}) or none."
        ]

    @property
    def ranking(self) -> RankingMetrics:
        """The metrics to quote."""
        return self.measured.ranking

    @property
    def strict(self) -> RankingMetrics:
        """The same with everything after the filter not retrieved."""
        return self.measured.strict

    @property
    def ceiling(self) -> RankingMetrics:
        """A perfect scorer inside the filter."""
        return self.measured.ceiling

    @property
    def baseline(self) -> RankingMetrics | None:
        """The filter's own ranking; None without a filter."""
        return self.measured.baseline

    @property
    def figures(self) -> dict[int, tuple[float, float]]:
        """Average precision and inverse negative penalty of each query, of which mAP and mINP are the means."""
        pairs = zip(self.ranking.average_precisions, self.ranking.inverse_negative_penalties, strict=True)
        return {
            int(query): (float(precision), float(penalty))
            for query, (precision, penalty) in zip(self.ranking.query_indices, pairs, strict=True)
        }

    @property
    def filter_recall(self) -> float:
        """Mean share of a query's matches that the filter kept."""
        return self.measured.recall


def _describe_metrics(metrics: RankingMetrics) -> dict[str, Any]:
    return {
        "mAP": metrics.mean_ap,
        "mAP_interval": list(metrics.interval),
        **{f"Rank-{k}": metrics.cmc[k] for k in HEADLINE_RANKS},
        "mINP": metrics.mean_inp,
        "tie_rate": metrics.tie_rate,
        "valid_queries": metrics.valid_queries,
    }


@cache
def list_versions() -> dict[str, str | None]:
    """Return the versions of Python, this package and those it computes with; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "chatreid_plugin": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def describe_results(results: Results) -> dict[str, Any]:
    """Return the content of ``results.json``: metrics as fractions, definitions, settings, versions, provenance."""
    benchmark, parts = results.benchmark, results.splits or (results,)
    sizes = [len(one.benchmark.gallery) for one in parts]
    return {
        "metrics": _describe_metrics(results.ranking),
        "warnings": list(results.warnings),
        "cmc_curve": [results.ranking.cmc[k] for k in CURVE_RANKS],
        "trials": [{"mAP": one.mean_ap, "Rank-1": one.cmc[1]} for one in results.measured.trials],
        "strict": _describe_metrics(results.strict),
        "filter": {
            "source": results.settings.filter.source,
            **_describe_threshold(results),
            "recall": results.filter_recall,
            "cut_tie_rate": results.measured.cut_tie_rate,
            "recall_at": {str(k): share for k, share in results.measured.recall_at.items()},
            "mean_candidates": results.pairs / sum(len(one.benchmark.queries) for one in parts),
            "ceiling": _describe_metrics(results.ceiling),
            "baseline": None if results.baseline is None else _describe_metrics(results.baseline),
        },
        "protocol": {
            "name": benchmark.name,
            "variant": benchmark.variant,
            "queries": sum(len(one.benchmark.queries) for one in parts),
            "gallery": float(np.mean(sizes)) if len(set(sizes)) > 1 else sizes[0],
            "pairs_scored": results.pairs,
            "average_precision": benchmark.average_precision,
            "cmc": benchmark.cmc,
            "ties": benchmark.ties,
            "ignored": RULES[benchmark.rule],
            "copied_queries": benchmark.copied_queries,
            "unlike_published": benchmark.unlike_published,
            "trials": len(parts[0].measured.trials),
            "splits": len(parts),
            "skipped_queries": [{"query": item.query_id, "reason": item.reason} for item in benchmark.skipped],
        },
        "scores": {
            "scorer": results.scorer,
            "source": results.source,
            "confidence": results.confidence,
            "warning": WARNINGS.get(results.confidence),
            "method": describe_method(results.settings),
        },
        "definitions": define_terms(benchmark),
        "settings": results.settings.model_dump(mode="json"),
        "versions": list_versions(),
        "provenance": _describe_provenance(results) if not results.splits else None,
        "splits": [_describe_split(one) for one in results.splits],
    }


def _describe_threshold(results: Results) -> dict[str, Any]:
    """Return the threshold that was applied, None without one or of several splits, and how it was found."""
    found, fixed = results.calibration, results.settings.filter.tau
    used = results.settings.filter.source != "none" and fixed != "auto"
    return {
        "tau": found.tau if found is not None else fixed if used else None,
        "calibration": None if found is None else asdict(found),
    }


def _describe_provenance(results: Results) -> dict[str, Any]:
    manifest = results.settings.data.manifest
    return {
        "manifest": str(manifest),
        "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "manifest_provenance": read_json(manifest.with_name(manifest.name + ".json")),
        "image_root": str(results.benchmark.image_root),
        "scores": str(results.scores_path),
        "fingerprint": dict(results.fingerprint),
    }


def _describe_split(results: Results) -> dict[str, Any]:
    """Return what differs between splits, beside their metrics; each one's own ``results.json`` has the rest."""
    return {
        "folder": results.settings.output.output_dir.name,
        "variant": results.benchmark.variant,
        "queries": len(results.benchmark.queries),
        "gallery": len(results.benchmark.gallery),
        "pairs_scored": results.pairs,
        "skipped_queries": len(results.benchmark.skipped),
        **_describe_threshold(results),
        "provenance": _describe_provenance(results),
    }


def write_results(output: Path, content: Mapping[str, Any], seconds: float, processes: int) -> None:
    """Write ``results.json``, and beside it what differs from one run to the next: ``run.json``.

    Args:
        output: the folder.
        content: of ``results.json``.
        seconds: what this run took; a resumed one does not know of the runs before.
        processes: how many there were.
    """
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(output / "run.json", {"finished": finished, "seconds": round(seconds, 1), "processes": processes})
    write_json(output / "results.json", content)


class ShownRankings:
    """What files and page show of the first trial's rankings: a row a query, and the worst queries' galleries."""

    def __init__(self, benchmark: Benchmark, most: int) -> None:
        """``most``: how many queries the page shows."""
        self.benchmark = benchmark
        self.most = most
        self._rows: list[dict[str, Any]] = []
        self._worst: list[tuple[float, int, Ranking]] = []

    def add(self, ranking: Ranking, precision: float | None) -> None:
        """Take a query's ranking, with its average precision if it has a match."""
        self._rows.append(_build_row(self.benchmark, ranking))
        if precision is not None and self.most:
            # The heap's first one is the best of the worst.
            item = -precision, -ranking.query, ranking
            (heapq.heappush if len(self._worst) < self.most else heapq.heappushpop)(self._worst, item)

    def list_rows(self, figures: Mapping[int, tuple[float, float]]) -> list[dict[str, Any]]:
        """Return the rows of ``rankings.parquet``.

        Args:
            figures: each query's average precision and inverse negative penalty, whose means are quoted; a query in no
                mean has none.
        """
        found = [figures.get(query, (None, None)) for query in range(len(self._rows))]
        return [
            row | {"average_precision": precision, "inverse_negative_penalty": penalty}
            for row, (precision, penalty) in zip(self._rows, found, strict=True)
        ]

    def build_views(self) -> list[dict[str, Any]]:
        """Return what the page shows, lowest average precision first."""
        worst = sorted(self._worst, key=lambda item: (-item[0], -item[1]))
        return [_view_ranking(self.benchmark, ranking, -precision) for precision, _, ranking in worst]


def _build_row(benchmark: Benchmark, ranking: Ranking) -> dict[str, Any]:
    """Return a row of ``rankings.parquet`` but its figures; images after the filter have no score and get null."""
    order, known = ranking.list_order(), ranking.list_scores()
    matches = _find_matches(ranking, order)
    found = np.flatnonzero(matches)
    shown: list[int] = order[:RANKING_DEPTH].tolist()
    return {
        "query_id": benchmark.queries[ranking.query].query_id,
        "gallery_ids": [benchmark.gallery[index].image_id for index in shown],
        "scores": [known.get(index) for index in shown],
        "matches": matches[:RANKING_DEPTH].tolist(),
        "first_match": int(found[0]) + 1 if len(found) else None,
    }


def _find_matches(ranking: Ranking, order: IntArray) -> BoolArray:
    """Return which images of an order, in the whole gallery's indices, are matches."""
    return ranking.matches[np.searchsorted(ranking.places, order)]


def describe_method(settings: EvalSettings) -> str:
    """Return how the run asked and what it was filtered and fused with, in one line."""
    scoring = settings.scoring
    parts = [f"mode {scoring.mode}"] if not scoring.reads_scores else []
    if scoring.backend == "transformers" and scoring.mode == "pointwise":
        parts.append(f"image order {scoring.image_order}")
    return ", ".join([*parts, f"filter {settings.filter.source}", f"fusion {scoring.fusion}"])


def _describe_counts(results: Results) -> str:
    """Return the numbers of queries and pairs, of all splits together, and of images in each one's gallery."""
    sizes = sorted({len(one.benchmark.gallery) for one in results.splits or (results,)})
    gallery = " to ".join(f"{size:,}" for size in sorted({sizes[0], sizes[-1]}))
    return (
        f"{results.ranking.valid_queries:,} valid queries ({len(results.benchmark.skipped):,} skipped), "
        f"{gallery} gallery images{' a split' if results.splits else ''}, {results.pairs:,} pairs scored"
    )


def list_calibrations(results: Results) -> list[Calibration]:
    """Return how the filter's threshold was found, in each split; empty where it was fixed."""
    found = (one.calibration for one in results.splits or (results,))
    return [one for one in found if one is not None]


def render_table(results: Results) -> str:
    """Return the results as a small table in percent, with what the columns and rows mean."""
    benchmark, settings = results.benchmark, results.settings
    columns = {"ranking": results.ranking, "strict": results.strict, "ceiling": results.ceiling}
    if results.baseline is not None:
        columns["baseline"] = results.baseline
    rows = [("mAP", [metrics.mean_ap for metrics in columns.values()])]
    for k in HEADLINE_RANKS:
        rows.append((f"Rank-{k}", [metrics.cmc[k] for metrics in columns.values()]))
    rows.append(("mINP", [metrics.mean_inp for metrics in columns.values()]))
    low, high = results.ranking.interval
    terms, trials = define_terms(benchmark), results.measured.trials
    spread = float(np.std([one.mean_ap for one in trials])), float(np.std([one.cmc[1] for one in trials]))
    kind = "splits" if results.splits else "trials"
    several = f"Mean of {len(trials)} {kind}, between which mAP deviates by {100 * spread[0]:.2f} and Rank-1 by "
    recalls = ", ".join(f"{k}: {100 * share:.2f}" for k, share in results.measured.recall_at.items())
    lines = [
        f"{benchmark.name} ({benchmark.variant}), scored by {results.scorer}",
        describe_method(settings),
        _describe_counts(results),
        *(f"Warning: {text}" for text in results.warnings),
        "",
        f"{'%':<9}" + "".join(f"{name:>10}" for name in columns),
        *(f"{name:<9}" + "".join(f"{100 * value:>10.2f}" for value in values) for name, values in rows),
        "",
        f"mAP interval {100 * low:.2f} to {100 * high:.2f}; filter {settings.filter.source}: recall "
        f"{100 * results.filter_recall:.2f}, ceiling mAP {100 * results.ceiling.mean_ap:.2f}; "
        f"tie rate {100 * results.ranking.tie_rate:.2f}, "
        f"at the filter's cut {100 * results.measured.cut_tie_rate:.2f}",
        *([f"filter recall at {recalls}"] if recalls else []),
        *(one.describe() for one in list_calibrations(results)),
        *([f"{several}{100 * spread[1]:.2f}"] if len(trials) > 1 else []),
        "",
        *(f"{name}: {terms[name]}." for name in ("mAP", "Rank-k", "mINP", "ties", *columns)),
    ]
    return "\n".join(lines)


def _view_image(record: ImageRecord, image_root: Path) -> dict[str, Any]:
    return {
        "picture": encode_thumbnail(image_root / record.path) if (image_root / record.path).is_file() else "",
        "image_id": record.image_id,
        "person": record.person_id,
        "camera": record.camera_id,
        "text": "",
    }


def _view_query(query: Query, image_root: Path) -> dict[str, Any]:
    picture = {} if query.image is None else _view_image(query.image, image_root)
    words = {"image_id": query.query_id, "person": query.person_id, "camera": query.camera_id, "text": query.label}
    return {"picture": "", **picture, **words}


def _view_ranking(benchmark: Benchmark, ranking: Ranking, average_precision: float) -> dict[str, Any]:
    """Return what the page shows of one query: its picture, the first ten, and the matches that are not among them."""
    order, known = ranking.list_order(), ranking.list_scores()
    is_match = _find_matches(ranking, order)
    missed = [rank for rank in np.flatnonzero(is_match).tolist() if rank >= SHOWN]

    def view(rank: int) -> dict[str, Any]:
        index = int(order[rank])
        record = benchmark.gallery[index]
        image = _view_image(record, benchmark.image_root)
        if benchmark.ranks_captions:
            image |= {"picture": "", "text": record.captions[0]}
        return {**image, "rank": rank + 1, "same": bool(is_match[rank]), "score": known.get(index)}

    return {
        "query": _view_query(benchmark.queries[ranking.query], benchmark.image_root),
        "average_precision": average_precision,
        "right_at_one": bool(is_match[0]),
        "matches": int(is_match.sum()),
        "top": [view(rank) for rank in range(min(SHOWN, len(order)))],
        "missed": [view(rank) for rank in missed[:SHOWN]],
        "missed_count": len(missed),
    }


def draw_curves(results: Results) -> str:
    """Return the CMC curves of the ranking and its baseline as a picture in a data URL."""
    # Imported here: matplotlib takes a second, and a run may be stopped long before it is needed.
    from .comparison import draw_cmc_curves

    curves = {"ranking": list(results.ranking.cmc.values())}
    if results.baseline is not None:
        curves["baseline"] = list(results.baseline.cmc.values())
    return embed_png(encode_png(draw_cmc_curves({results.benchmark.name: curves})))


def render_page(results: Results, views: Sequence[Mapping[str, Any]]) -> str:
    """Return the HTML of the page; every text from outside is escaped."""
    ranking = results.ranking
    figures = [("mAP", ranking.mean_ap), *((f"Rank-{k}", ranking.cmc[k]) for k in HEADLINE_RANKS)]
    figures += [("mINP", ranking.mean_inp), ("Filter recall", results.filter_recall)]
    figures += [("Ceiling mAP", results.ceiling.mean_ap)]
    figures += [(f"Recall@{k}", share) for k, share in results.measured.recall_at.items()]
    return render_template(
        TEMPLATE,
        benchmark=results.benchmark,
        scorer=results.scorer,
        method=describe_method(results.settings),
        calibrations=[one.describe() for one in list_calibrations(results)],
        figures=figures,
        definitions=define_terms(results.benchmark),
        warnings=results.warnings,
        curves=draw_curves(results),
        views=views,
        query_count=ranking.valid_queries,
        trial_count=len(results.measured.trials),
        wrong_count=sum(not view["right_at_one"] for view in views),
    )


def write_page(path: Path, results: Results, views: Sequence[Mapping[str, Any]]) -> None:
    """Write the page, atomically."""
    write_text(path, render_page(results, views))

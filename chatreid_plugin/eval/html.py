"""The page of ranked galleries: one HTML file with its pictures inside, which opens from disk without a network.

Last step of an evaluation, beside ``report``. The worst queries come first, since they are what one looks for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..crops import encode_thumbnail
from ..datasets.benchmark import Benchmark, Query
from ..pages import embed_png, encode_png, render_template
from ..records import ImageRecord
from ..shards import write_text
from .arrays import BoolArray, IntArray, ScoreArray
from .report import HEADLINE_RANKS, Results, describe_method, list_calibrations
from .terms import define_terms


TEMPLATE = Path(__file__).with_name("report.html.j2")
SHOWN = 10


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


def build_query_view(
    protocol: Benchmark,
    query: int,
    order: IntArray,
    candidates: IntArray,
    scores: ScoreArray,
    matches: BoolArray,
    average_precision: float,
) -> dict[str, Any]:
    """Return what the page shows of one query: its picture, the first ten, and the matches that are not among them.

    Args:
        protocol: names the images.
        query: index of the query.
        order: (N,) gallery indices in ranking order.
        candidates: (K,) gallery indices that were scored.
        scores: (K,) their scores.
        matches: (G,) which gallery images are matches.
        average_precision: of this query in this gallery.
    """
    known = dict(zip(candidates.tolist(), scores.tolist(), strict=True))
    is_match = matches[order]
    missed = [rank for rank in np.flatnonzero(is_match).tolist() if rank >= SHOWN]

    def view(rank: int) -> dict[str, Any]:
        index = int(order[rank])
        record = protocol.gallery[index]
        image = _view_image(record, protocol.image_root)
        if protocol.ranks_captions:
            image |= {"picture": "", "text": record.captions[0]}
        return {**image, "rank": rank + 1, "same": bool(is_match[rank]), "score": known.get(index)}

    return {
        "query": _view_query(protocol.queries[query], protocol.image_root),
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
    return embed_png(encode_png(draw_cmc_curves({results.protocol.name: curves})))


def render_page(results: Results, views: Sequence[Mapping[str, Any]]) -> str:
    """Return the HTML of the page; every text from outside is escaped."""
    ranking = results.ranking
    figures = [("mAP", ranking.mean_ap), *((f"Rank-{k}", ranking.cmc[k]) for k in HEADLINE_RANKS)]
    figures += [("mINP", ranking.mean_inp), ("Filter recall", results.filter_recall)]
    figures += [("Ceiling mAP", results.ceiling.mean_ap)]
    figures += [(f"Recall@{k}", share) for k, share in results.measured.recall_at.items()]
    return render_template(
        TEMPLATE,
        protocol=results.protocol,
        scorer=results.scorer,
        method=describe_method(results.settings),
        calibrations=[one.describe() for one in list_calibrations(results)],
        figures=figures,
        definitions=define_terms(results.protocol),
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

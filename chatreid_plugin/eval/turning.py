"""Images that ask for captions (``setting: image_to_text``): asked the other way round, and the answers turned.

The question is of one caption and one image either way, and a model computes a caption once for all its images. So the
captions ask those images that kept them, and the scores are the very ones of ``text_to_image``: without a filter each
direction goes on with the scores that the other one saved.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .arrays import IntArray, ScoreArray
from .plan import Plan
from .protocols import label_protocol
from .queries import Query


def turn_plan(plan: Plan) -> Plan:
    """Return the plan in which the captions that images rank ask those images."""
    protocol = plan.protocol
    captions = [Query(record.image_id, record.person_id, text=record.captions[0]) for record in protocol.gallery]
    images = [query.image for query in protocol.queries if query.image is not None]
    asked = replace(protocol, queries=captions, gallery=images, ranks_captions=False)
    kept = _turn_lists(plan.kept, len(captions))
    features = plan.gallery_features, plan.query_features
    return Plan(asked, label_protocol(asked), *features, [kept], kept, scorer=plan.scorer)


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

"""Every cmc and average precision under random tie order, whatever the gallery's order; the edges of a ranking."""

from itertools import permutations, product
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatreid_plugin.errors import DataError
from chatreid_plugin.eval.metrics import RankingMetrics, evaluate_ranking
from chatreid_plugin.eval.tied import AveragePrecision, Cmc


TOPK = (1, 2, 3, 9)
CMCS: tuple[Cmc, ...] = ("standard", "unique_identity", "single_gallery_shot")
DEFINITIONS: tuple[AveragePrecision, ...] = ("mean", "trapezoid")
GALLERIES = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.booleans()), min_size=1, max_size=5)


def measure(gallery: list[tuple[int, int, bool]], **options: Any) -> RankingMetrics:
    """Ask for identity 1 in a gallery of (score, identity, ignored)."""
    scores, people, junk = (np.array(column) for column in zip(*gallery, strict=True))
    return evaluate_ranking([scores.astype(float)], [1], people, ignore=lambda query: junk, topk=TOPK, **options)


def enumerate_orders(
    gallery: list[tuple[int, int, bool]], cmc: Cmc, definition: AveragePrecision
) -> tuple[float, list[float], float]:
    """Return AP, CMC and INP averaged over each order of the tied items and each draw of one image an identity."""
    kept = [(score, person) for score, person, junk in gallery if not junk]
    groups = [[i for i, (_, person) in enumerate(kept) if person == own] for own in sorted({p for _, p in kept})]
    draws = list(product(*groups)) if cmc == "single_gallery_shot" else [tuple(range(len(kept)))]
    precisions, places, penalties = [], [], []
    for order in permutations(range(len(kept))):
        ranked = sorted(order, key=lambda item: -kept[item][0])
        ranks = [rank for rank, item in enumerate(ranked) if kept[item][1] == 1]
        values = [(found + 1) / (rank + 1) for found, rank in enumerate(ranks)]
        if definition == "trapezoid":
            earlier = [found / rank if rank else 1.0 for found, rank in enumerate(ranks)]
            values = [(value + before) / 2 for value, before in zip(values, earlier, strict=True)]
        precisions.append(np.mean(values))
        penalties.append(len(ranks) / (ranks[-1] + 1))
        for draw in draws:
            people = [kept[item][1] for item in ranked if item in draw]
            places.append((people if cmc == "standard" else list(dict.fromkeys(people))).index(1))
    hits = [float(np.mean([place < k for place in places])) for k in TOPK]
    return float(np.mean(precisions)), hits, float(np.mean(penalties))


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("cmc", CMCS)
@settings(max_examples=25, deadline=None)
@given(gallery=GALLERIES, random=st.randoms(use_true_random=False))
def test_equals_all_orders_and_keeps_when_the_gallery_is_permuted(
    cmc: Cmc, definition: AveragePrecision, gallery: list[tuple[int, int, bool]], random: Any
) -> None:
    gallery = [(1, 1, False), *gallery]
    shuffled = random.sample(gallery, len(gallery))
    precision, hits, penalty = enumerate_orders(gallery, cmc, definition)
    for items in (gallery, shuffled):
        found = measure(items, cmc=cmc, average_precision=definition)
        assert found.mean_ap == pytest.approx(precision, abs=1e-12)
        assert list(found.cmc.values()) == pytest.approx(hits, abs=1e-12)
        assert found.mean_inp == pytest.approx(penalty, abs=1e-12)


@pytest.mark.parametrize("cmc", CMCS)
def test_refuses_with_the_reason_when_the_gallery_is_empty_or_all_junk(cmc: Cmc) -> None:
    with pytest.raises(DataError, match="identity absent from the gallery"):
        evaluate_ranking(np.zeros((1, 0)), [1], [], cmc=cmc)
    with pytest.raises(DataError, match="all its gallery images are ignored"):
        measure([(2, 1, True), (1, 1, True)], cmc=cmc)


@pytest.mark.parametrize("cmc", CMCS)
def test_hits_at_once_when_only_the_negatives_are_junk(cmc: Cmc) -> None:
    found = measure([(2, 2, True), (1, 1, False), (2, 3, True)], cmc=cmc)
    assert list(found.cmc.values()) == [1.0] * len(TOPK)
    assert found.mean_ap == found.mean_inp == 1.0


@pytest.mark.parametrize("cmc", CMCS)
def test_every_match_is_found_when_k_exceeds_the_gallery(cmc: Cmc) -> None:
    found = measure([(3, 2, False), (2, 3, False), (1, 1, False)], cmc=cmc)
    assert list(found.cmc.values()) == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("cmc", "rank_1"), [("standard", 2 / 5), ("unique_identity", 2 / 5), ("single_gallery_shot", 1 / 3)]
)
def test_rank_1_is_the_share_of_positives_or_identities_when_all_scores_are_equal(cmc: str, rank_1: float) -> None:
    people = (2, 1, 2, 1, 3)
    found = measure([(0, person, False) for person in people], cmc=cast(Cmc, cmc))
    assert found.cmc[1] == pytest.approx(rank_1)
    assert found.tie_rate == 1.0

"""Tests of chatreid_plugin.engine.sampler: queries by attributes, what is asked, who fits and who does not."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from scipy.stats import chisquare

from chatreid_plugin.engine.pool import ImageTable, combine_images
from chatreid_plugin.engine.sampler import MOST_ATTRIBUTES, AttributeQuery, ImagePool, build_attribute_query
from chatreid_plugin.images import ImagePolicy
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import make_manifest_table


MakeImages = Callable[..., list[ImageRecord]]
IndexImages = Callable[..., ImagePool]


@pytest.fixture
def pool(make_images: MakeImages, index_images: IndexImages) -> ImagePool:
    """Return images of 27 looks, the combinations of three values of three attributes, and some without any."""
    values = ("one", "two", "three")
    looks = [{"hat": a, "bag": b, "shoes": c} for a in values for b in values for c in values]
    records = make_images(people=40, cameras=2, images=2)
    described = [replace(r, attributes=looks[i % 27] if i % 5 else {}) for i, r in enumerate(records)]
    return index_images(described)


def list_looks(pool: ImagePool, image: int) -> set[tuple[str, str]]:
    return {(item["name"], item["value"]) for item in pool.table.get_column("attributes")[image].as_py()}


def list_asked(pool: ImagePool, query: AttributeQuery) -> set[tuple[str, str]]:
    return {(item["name"], item["value"]) for item in pool.table.attributes.take(query.asked).to_pylist()}


def test_matches_have_all_that_is_asked_and_others_lack_some(pool: ImagePool) -> None:
    for seed in range(300):
        query = build_attribute_query(pool, random.Random(seed), 3, 4)
        asked = list_asked(pool, query)
        assert len(asked) == len(query.asked)
        assert all(asked <= list_looks(pool, image) for image in query.matches)
        assert not any(asked <= list_looks(pool, image) for image in query.others)
        shown = [*query.matches, *query.others]
        assert len(set(shown)) == len(shown) == 7
        # Only images whose attributes are known: of the others nobody knows whether they match.
        assert all(list_looks(pool, image) for image in shown)


def test_one_to_three_attributes_are_asked_as_often(pool: ImagePool) -> None:
    counts = Counter(len(build_attribute_query(pool, random.Random(seed), 1, 1).asked) for seed in range(3000))
    assert set(counts) == set(range(1, MOST_ATTRIBUTES + 1))
    assert chisquare(list(counts.values())).pvalue > 0.001


def test_matches_that_there_are_not_are_made_up_for(make_images: MakeImages, index_images: IndexImages) -> None:
    records = [replace(r, attributes={"code": r.path}) for r in make_images(people=10, cameras=1, images=1)]
    query = build_attribute_query(index_images(records), random.Random(0), 4, 2)
    assert (len(query.matches), len(query.others)) == (1, 5)


def test_everybody_may_have_what_is_asked(make_images: MakeImages, index_images: IndexImages) -> None:
    pool = index_images(make_images(people=4, cameras=1, images=1, attributes={"hat": "cap"}))
    query = build_attribute_query(pool, random.Random(0), 2, 2)
    assert (len(query.matches), query.others) == (2, [])


def test_attributes_of_a_second_source_are_found(make_images: MakeImages) -> None:
    first, second = make_images(people=3), [replace(r, dataset="b") for r in make_images(people=6, colours=3)]
    table = ImageTable(combine_images([make_manifest_table(records) for records in (first, second)]))
    pool = ImagePool(table, table.sources[1], ImagePolicy(3))
    for seed in range(50):
        query = build_attribute_query(pool, random.Random(seed), 2, 2)
        asked = list_asked(pool, query)
        assert all(asked <= list_looks(pool, pool.first + image) for image in query.matches)
        assert not any(asked <= list_looks(pool, pool.first + image) for image in query.others)

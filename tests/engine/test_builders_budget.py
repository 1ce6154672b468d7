"""Tests of chatreid_plugin.engine.builders: records fit ``cutoff_len``, galleries are cut to it, or it is an error."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.builders import build_draft
from chatreid_plugin.engine.pool import Draft
from chatreid_plugin.engine.sampler import ImagePool
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.tasks import TASKS


MakePool = Callable[..., ImagePool]
MakeImages = Callable[..., list[ImageRecord]]
IndexImages = Callable[..., ImagePool]
# Tokens of an image of 192 x 384 pixels with what stands around it, and those kept free for text.
LARGE, FREE = 98 + 5, 256


def draw_one(task: str, pool: ImagePool, seed: int, **changes: Any) -> Draft:
    source = {"name": "own", "root": "raw"}
    settings = BuildSettings.model_validate({"sources": [source], "records": {"stage1": 1}} | changes)
    return build_draft(task, pool, random.Random(seed), settings, "record-0")


@pytest.mark.parametrize("task", TASKS)
def test_records_stay_below_the_cutoff(task: str, make_pool: MakePool) -> None:
    pool = make_pool(size=(192, 384), outfits=3, infrared=2, views=True)
    drafts = [draw_one(task, pool, seed, cutoff_len=700, gallery={"max_size": 10}) for seed in range(150)]
    assert max(LARGE * len(draft.images) for draft in drafts) < 700
    if "{gallery}" in TASKS[task].prompts[0]:
        # (700 - 256 - around the images) // 98 images fit, of the 11 that were drawn; the answer is still there.
        # A further turn takes room for 128 tokens, an image and a quarter.
        assert max(len(draft.images) for draft in drafts) in ((2, 3) if task == "dialogue_retrieval" else (3, 4))
        assert all(draft.matches for draft in drafts)


def test_cutoff_drops_negatives_first_and_keeps_the_matches(make_pool: MakePool) -> None:
    pool = make_pool(size=(192, 384))
    gallery = {"min_size": 10, "max_size": 10}
    for seed in range(100):
        free = draw_one("standard_reid", pool, seed, gallery=gallery)
        draft = draw_one("standard_reid", pool, seed, gallery=gallery, cutoff_len=FREE + 7 * LARGE - 1)
        assert (len(free.images), len(draft.images)) == (11, 6)
        assert draft.images[0] == free.images[0]
        assert len(draft.matches) == min(5, len(free.matches))
        assert {draft.images[1 + i] for i in draft.matches} <= {free.images[1 + i] for i in free.matches}


def test_cutoff_counts_every_image_as_large_as_it_is(make_images: MakeImages, index_images: IndexImages) -> None:
    small, large = make_images(people=10), make_images(people=10, size=(192, 384))
    pool = index_images([(large if number % 3 else small)[number] for number in range(len(small))])
    lengths: set[int] = set()
    for seed in range(100):
        draft = draw_one("standard_reid", pool, seed, cutoff_len=FREE + 500)
        lengths.add(sum(pool.tokens[image] + 5 for image in draft.images))
    # An image more would not have fitted.
    assert 500 - LARGE < max(lengths) <= 500


@pytest.mark.parametrize(
    "task", [name for name, task in TASKS.items() if "{gallery}" in task.prompts[0] and not task.follow_ups]
)
def test_gallery_leaves_room_for_what_the_query_says(
    task: str, make_images: MakeImages, index_images: IndexImages
) -> None:
    # 300 characters are 101 tokens.
    records = [
        replace(r, captions=(f"{r.path} ".ljust(300, "x"),), attributes={"hat": f"{r.person_id} ".ljust(297, "x")})
        for r in make_images(size=(192, 384), cameras=6, outfits=3, infrared=2)
    ]
    pool = index_images(records)
    drafts = [draw_one(task, pool, seed, cutoff_len=FREE + 101 + 4 * LARGE) for seed in range(150)]
    assert max(len(draft.images) for draft in drafts) == 4


@pytest.mark.parametrize(
    "task",
    [
        "text_to_image_one_to_many",
        "image_captioning",
        "text_to_image_many_to_one",
        "text_to_image_reid",
        "multimodal_retrieval",
    ],
)
def test_long_captions_count_as_well(
    task: str, make_pool: MakePool, make_images: MakeImages, index_images: IndexImages
) -> None:
    caption = "word " * 600
    assert draw_one(task, make_pool(size=(192, 384), views=True), 0, cutoff_len=1024).images
    records = [replace(r, captions=(f"{r.path} {caption}",)) for r in make_images(size=(192, 384))]
    with pytest.raises(DataError, match=r"record-0: .* do not fit cutoff_len 1024\. Raise it"):
        draw_one(task, index_images(records), 0, cutoff_len=1024)


@pytest.mark.parametrize("task", ["attribute_prediction", "attribute_comparison", "attribute_retrieval"])
def test_long_attributes_count_as_well(task: str, make_images: MakeImages, index_images: IndexImages) -> None:
    records = [replace(r, attributes={"hat": f"{r.person_id} " + "long " * 600}) for r in make_images()]
    with pytest.raises(DataError, match=r"record-0: .* do not fit cutoff_len 1024\. Raise it"):
        draw_one(task, index_images(records), 0, cutoff_len=1024)


def test_image_that_does_not_fit_is_an_error_that_says_what_to_raise(make_pool: MakePool) -> None:
    pool = make_pool(size=(192, 384))
    with pytest.raises(DataError, match=r"Record record-0: 103 tokens of 1 image.* cutoff_len 300\. Raise it"):
        draw_one("attribute_prediction", pool, 0, cutoff_len=300)
    with pytest.raises(DataError, match=r"Record record-0: 206 tokens of 2 image.* cutoff_len 461\. Raise it"):
        draw_one("standard_reid", pool, 0, cutoff_len=FREE + 2 * LARGE - 1)
    assert len(draw_one("standard_reid", pool, 0, cutoff_len=FREE + 2 * LARGE).images) == 2

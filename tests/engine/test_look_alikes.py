"""Tests of chatreid_plugin.engine.look_alikes: the nearest of other people, camera by camera, and always the same."""

from collections.abc import Callable

import numpy as np
import pytest

from chatreid_plugin.archives import normalise
from chatreid_plugin.engine import look_alikes
from chatreid_plugin.engine.look_alikes import NEAREST, Appearances, LookAlikes, find_nearest


Pick = Callable[[int, int], list[int]]
RNG = np.random.default_rng(4)
# 60 people of one to twelve images in 5 cameras, some of which see few.
PEOPLE = np.sort(RNG.integers(60, size=400))
CAMERAS = RNG.choice(5, size=400, p=[0.5, 0.3, 0.15, 0.04, 0.01])
FEATURES = RNG.standard_normal((400, 96)).astype(np.float32)


def find(features: np.ndarray = FEATURES) -> np.ndarray:
    return find_nearest(Appearances(PEOPLE, CAMERAS), CAMERAS, features, "own")


def index(people: list[int], cameras: list[int], features: list[list[float]]) -> Pick:
    appearances = Appearances(np.array(people), np.array(cameras))
    nearest = find_nearest(appearances, np.array(cameras), np.array(features), "own")
    found = LookAlikes(appearances, nearest)
    return lambda image, group: list(found.list_alike(image, group))


def test_look_alikes_are_the_nearest_of_other_people_in_each_camera_of_the_own_person() -> None:
    appearances = Appearances(PEOPLE, CAMERAS)
    found = LookAlikes(appearances, find())
    directions = normalise(FEATURES)
    asked = 0
    for image, person in enumerate(PEOPLE):
        if (PEOPLE == person).sum() == 1:
            assert appearances.row_starts[image] == appearances.row_starts[image + 1]
            continue
        similarities = directions @ directions[image]
        for camera in np.unique(CAMERAS[PEOPLE == person]):
            others = np.flatnonzero((CAMERAS == camera) & (PEOPLE != person))
            expected = others[np.argsort(-similarities[others])][:NEAREST]
            got = list(found.list_alike(image, int(camera)))
            assert len(got) == len(set(got)) == len(expected) and set(got) <= set(others.tolist())
            # Whole numbers stand for the directions: 1e-4 of a cosine may change places.
            assert similarities[got] == pytest.approx(similarities[expected], abs=4e-4)
            asked += 1
    assert asked > 800


def test_same_images_are_found_however_the_products_are_summed_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = find()
    # Another order of the sums, as other libraries and numbers of threads have it.
    assert np.array_equal(find(FEATURES[:, ::-1].copy()), expected)
    monkeypatch.setattr(look_alikes, "_COMPARED_AT_ONCE", 700)
    monkeypatch.setattr(look_alikes, "_ROUNDED_AT_ONCE", 7)
    assert np.array_equal(find(), expected)


def test_equally_similar_images_come_in_their_order_and_groups_may_show_few() -> None:
    # Person 0 asks in cameras 0 and 1; images 2 to 14 are alike, of other people.
    pick = index([0, 0, *range(1, 14)], [0, 1] + [0] * 12 + [1], [[1, 0]] * 2 + [[2, 1]] * 13)
    assert pick(0, 0) == list(range(2, 2 + NEAREST))
    assert pick(0, 1) == pick(1, 1) == [14]
    pick = index([0, 0, 1], [0, 1, 0], [[1, 0]] * 3)
    assert (pick(0, 0), pick(0, 1)) == ([2], [])

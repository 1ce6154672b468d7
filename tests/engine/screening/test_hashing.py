"""Tests of engine.screening.hashing: the banded search finds what comparing everything with everything finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatreid_plugin.engine.screening import hashing
from chatreid_plugin.engine.screening.hashing import (
    find_close_pairs,
    find_close_pairs_within,
    find_first_equal,
    pack_hashes,
    select_hashed,
)
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import make_manifest_table


TEXTURED = "f0" * 32
# Hashes that differ in few bits from a few centres, some of them equal.
CENTRES = [0, (1 << 256) - 1, int("a5c3" * 16, 16)]
FLIPS = st.sets(st.integers(0, 255), max_size=18)
HASHES = st.lists(
    st.builds(
        lambda centre, flips: f"{centre ^ sum(1 << flip for flip in flips):064x}", st.sampled_from(CENTRES), FLIPS
    ),
    max_size=12,
)


def measure_distance(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


def list_firsts(hashes: list[str], groups: list[int]) -> list[int]:
    keys = list(zip(hashes, groups, strict=True))
    return [row for row, key in enumerate(keys) if keys.index(key) == row]


def make_record(number: int, perceptual_hash: str, sharpness: float | None = None) -> ImageRecord:
    path = f"{number}.jpg"
    return ImageRecord(
        f"own/{path}", "own", "train", path, f"own:{number}", "1", 32, 64,
        perceptual_hash=perceptual_hash, sharpness=sharpness,
    )  # fmt: skip


@given(left=HASHES, right=HASHES, distance=st.integers(0, 15))
@settings(max_examples=60, deadline=None)
def test_pairs_of_two_sets_are_those_of_brute_force(left: list[str], right: list[str], distance: int) -> None:
    pairs = find_close_pairs(pack_hashes(left), pack_hashes(right), distance)
    found = list(zip(pairs.left.tolist(), pairs.distances.tolist(), pairs.right.tolist(), strict=True))
    expected = [
        (i, measure_distance(left[i], right[j]), j)
        for i in list_firsts(left, [0] * len(left))
        for j in list_firsts(right, [0] * len(right))
        if measure_distance(left[i], right[j]) <= distance
    ]
    assert found == sorted(expected)


@given(data=st.data(), distance=st.integers(0, 15))
@settings(max_examples=60, deadline=None)
def test_pairs_within_a_set_are_those_of_brute_force(data: st.DataObject, distance: int) -> None:
    hashes = data.draw(HASHES)
    groups = data.draw(st.lists(st.integers(0, 2), min_size=len(hashes), max_size=len(hashes)))
    pairs = find_close_pairs_within(pack_hashes(hashes), distance, np.array(groups, dtype=np.int64))
    found = set(zip(pairs.left.tolist(), pairs.right.tolist(), pairs.distances.tolist(), strict=True))
    firsts = list_firsts(hashes, groups)
    assert len(found) == len(pairs.left)
    assert found == {
        (i, j, measure_distance(hashes[i], hashes[j]))
        for i in firsts
        for j in firsts
        if i < j and groups[i] == groups[j] and measure_distance(hashes[i], hashes[j]) <= distance
    }


def test_pair_at_the_largest_distance_is_found_wherever_its_bits_lie() -> None:
    rng = np.random.default_rng(0)
    base = int(rng.integers(0, 1 << 62))
    others = [base ^ sum(1 << int(bit) for bit in rng.choice(256, 15, replace=False)) for _ in range(300)]
    pairs = find_close_pairs(pack_hashes([f"{base:064x}"]), pack_hashes([f"{other:064x}" for other in others]), 15)
    assert sorted(pairs.right.tolist()) == list(range(300))
    assert set(pairs.distances.tolist()) == {15}


def test_candidates_in_pieces_give_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    words = pack_hashes([f"{1 << bit:064x}" for bit in range(64)])
    groups = np.zeros(len(words), dtype=np.int64)
    whole = find_close_pairs_within(words, 4, groups)
    assert len(whole.left) == 64 * 63 // 2
    monkeypatch.setattr(hashing, "_COMPARED_AT_ONCE", 7)
    pieces = find_close_pairs_within(words, 4, groups)
    assert [pieces.left.tolist(), pieces.right.tolist()] == [whole.left.tolist(), whole.right.tolist()]


def test_thousands_of_equal_hashes_are_one() -> None:
    words = pack_hashes([TEXTURED] * 20_000)
    pairs = find_close_pairs(words, words, 15)
    assert (pairs.left.tolist(), pairs.right.tolist(), pairs.distances.tolist()) == ([0], [0], [0])
    assert set(find_first_equal(words).tolist()) == {0}


def test_first_equal_keeps_groups_apart() -> None:
    words = pack_hashes([TEXTURED, "0" * 64, TEXTURED, TEXTURED])
    assert find_first_equal(words).tolist() == [0, 1, 0, 0]
    assert find_first_equal(words, np.array([1, 0, 0, 1])).tolist() == [0, 1, 2, 0]


def test_distance_beyond_the_bands_is_refused() -> None:
    words = pack_hashes([TEXTURED])
    with pytest.raises(ValueError, match="0 to 15, got 16"):
        find_close_pairs(words, words, 16)


@pytest.mark.parametrize(("wrong", "message"), [("abcd", "'abcd' has not 64 digits"), ("x" * 64, "not hexadecimal")])
def test_wrong_hash_is_refused(wrong: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack_hashes([TEXTURED, wrong])


def test_flat_pictures_and_records_without_a_hash_are_left_out() -> None:
    flat, gradient = "8" + "0" * 63, "80000000" * 8
    records = [
        make_record(0, TEXTURED, 90.0),
        make_record(1, flat, 0.0),
        make_record(2, ""),
        make_record(3, gradient, 0.6),
        make_record(4, TEXTURED, 0.1),
        make_record(5, TEXTURED),
        make_record(6, "f" * 64),
    ]
    rows, words = select_hashed(make_manifest_table(records))
    assert rows.tolist() == [0, 5]
    assert words.shape == (2, 4)

"""Finds pairs of perceptual hashes (256 bits) that differ in a few bits, among hundreds of thousands."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from ...errors import DataError
from ...shards import pc


BITS = 256
# Pigeonhole rule: 15 different bits cannot touch all of 16 bands, so a pair within this distance agrees in a band.
BANDS = 16
LARGEST_DISTANCE = BANDS - 1
# A pHash marks which frequencies lie above their median: half of its bits. Ties, which only pictures without texture
# have, leave fewer (measured: 0 to 8 for one colour or one gradient, 128 for each of 4,128 person crops).
_FEWEST_BITS, _MOST_BITS = 64, 192
# Noise of compression may fill the hash of an even area. Measured sharpness: 0.14 and less then, 91 and more for
# person crops, 1.5 and more for crops blurred over 5 % of their height.
_FLAT_SHARPNESS = 1.0
# Each band takes one bit of each row and each column of the 16 x 16 frequencies: low ones are alike in most person
# crops, and bands of rows or columns would give 2 to 3 times as many candidates (measured).
_MIXED = np.array([16 * row + (band + row) % 16 for band in range(BANDS) for row in range(16)])
_PACKED_AT_ONCE = 65_536
# Candidates that are compared in one go: 32 MB on each side.
_COMPARED_AT_ONCE = 1_000_000

Words = NDArray[np.uint64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ClosePairs:
    """Pairs of rows whose hashes are close, ordered by left row, distance, right row.

    Attributes:
        left: rows of the first set.
        right: rows of the second set.
        distances: differing bits.
    """

    left: Rows
    right: Rows
    distances: Rows


def pack_hashes(hashes: Sequence[str]) -> Words:
    """Return hexadecimal hashes as four words of 64 bits each, shape (len(hashes), 4), bits mixed for the search.

    Raises:
        DataError: a hash does not have 64 hexadecimal digits.
    """
    packed = np.empty((len(hashes), BITS // 64), dtype=np.uint64)
    for first in range(0, len(hashes), _PACKED_AT_ONCE):
        piece = hashes[first : first + _PACKED_AT_ONCE]
        wrong = next((value for value in piece if len(value) != BITS // 4), None)
        if wrong is not None:
            raise DataError(f"Perceptual hash {wrong!r} has not {BITS // 4} digits. Run `chatreid parse` again.")
        try:
            content = np.frombuffer(bytes.fromhex("".join(piece)), dtype=np.uint8).reshape(len(piece), -1)
        except ValueError as error:
            raise DataError(f"A perceptual hash is not hexadecimal ({error}). Run `chatreid parse` again.") from None
        mixed = np.ascontiguousarray(np.unpackbits(content, axis=1)[:, _MIXED])
        packed[first : first + len(piece)] = np.packbits(mixed, axis=1).view(np.uint64)
    return packed


def select_hashed(images: pa.Table) -> tuple[Rows, Words]:
    """Return the rows of the images whose perceptual hash says something, and the hashes, packed.

    Left out are images without a hash and flat pictures (one colour, a gradient): those look alike whatever they
    show. Flat is a hash with less than a quarter or more than three quarters of its bits set, or a sharpness below 1.
    """
    hashes = pc.fill_null(images["perceptual_hash"], "")
    sharp = pc.fill_null(pc.greater_equal(images["sharpness"], _FLAT_SHARPNESS), True)
    rows = np.flatnonzero(pc.and_(pc.not_equal(hashes, ""), sharp).to_numpy())
    words = pack_hashes(hashes.take(rows).to_pylist())
    ones = _count_bits(words)
    textured = (ones >= _FEWEST_BITS) & (ones <= _MOST_BITS)
    return rows[textured], words[textured]


def find_first_equal(words: Words, groups: Rows | None = None) -> Rows:
    """Return, for each hash, the row of the first equal one of the same group (its own row if it is the first)."""
    if not len(words):
        return np.empty(0, dtype=np.int64)
    keys = [*words.T] if groups is None else [*words.T, groups]
    order = np.lexsort(keys)  # stable: equal ones stay in the order of their rows
    starts = np.ones(len(words), dtype=bool)
    starts[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    first = np.empty(len(words), dtype=np.int64)
    first[order] = order[np.flatnonzero(starts)[np.cumsum(starts) - 1]]
    return first


def find_close_pairs(left: Words, right: Words, distance: int) -> ClosePairs:
    """Return all pairs of a left and a right hash that differ in at most ``distance`` bits.

    Of equal hashes of one side only the first takes part (``find_first_equal`` tells which): a thousand copies of a
    picture on both sides would be a million pairs.

    Args:
        left: packed hashes, shape (n, 4).
        right: packed hashes, shape (m, 4).
        distance: 0 to 15; the search is exact.
    """
    left_rows, right_rows = (np.unique(find_first_equal(words)) for words in (left, right))
    pairs = _search(left[left_rows], right[right_rows], distance)
    return _sort_pairs(left_rows[pairs.left], right_rows[pairs.right], pairs.distances)


def find_close_pairs_within(words: Words, distance: int, groups: Rows) -> ClosePairs:
    """Return all pairs of one set, of the same group, that differ in at most ``distance`` bits; left is before right.

    Of equal hashes of a group only the first takes part, as in ``find_close_pairs``.

    Args:
        words: packed hashes, shape (n, 4).
        distance: 0 to 15; the search is exact.
        groups: shape (n,), from 0 and below 2**40: only hashes of equal group are compared.
    """
    rows = np.unique(find_first_equal(words, groups))
    pairs = _search(words[rows], None, distance, groups[rows])
    return _sort_pairs(rows[pairs.left], rows[pairs.right], pairs.distances)


def _sort_pairs(left: Rows, right: Rows, distances: Rows) -> ClosePairs:
    order = np.lexsort((right, distances, left))
    return ClosePairs(left[order], right[order], distances[order])


def _count_bits(words: Words) -> Rows:
    return np.bitwise_count(words).sum(axis=-1, dtype=np.int64)


def _search(left: Words, right: Words | None, distance: int, groups: Rows | None = None) -> ClosePairs:
    """Compare what agrees in at least one band; without ``right`` a set is compared with itself."""
    if not 0 <= distance <= LARGEST_DISTANCE:
        raise ValueError(f"distance must be 0 to {LARGEST_DISTANCE}, got {distance}")
    other = left if right is None else right
    found: list[tuple[Rows, Rows, Rows]] = []
    for band in tqdm(range(BANDS), desc="comparing hashes", unit="band", delay=1, leave=False):
        left_keys, right_keys = (_compute_keys(words, band, groups) for words in (left, other))
        for left_rows, right_rows in _iterate_candidates(left_keys, right_keys):
            if right is None:
                before = left_rows < right_rows
                left_rows, right_rows = left_rows[before], right_rows[before]
            differing = left[left_rows] ^ other[right_rows]
            distances = _count_bits(differing)
            close = distances <= distance
            # A pair that agrees in several bands is taken at the first of them.
            close[close] = (differing[close].view(np.uint16)[:, :band] != 0).all(axis=1)
            found.append((left_rows[close], right_rows[close], distances[close]))
    if not found:
        nothing = np.empty(0, dtype=np.int64)
        return ClosePairs(nothing, nothing, nothing)
    return ClosePairs(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _compute_keys(words: Words, band: int, groups: Rows | None) -> Rows:
    keys = words.view(np.uint16)[:, band].astype(np.int64)
    return keys if groups is None else keys + (groups << 16)


def _iterate_candidates(left_keys: Rows, right_keys: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Yield (left rows, right rows) with equal keys, about a million pairs at a time."""
    order = np.argsort(left_keys, kind="stable")
    ordered = left_keys[order]
    starts = np.searchsorted(ordered, right_keys, side="left")
    counts = np.searchsorted(ordered, right_keys, side="right") - starts
    ends = np.cumsum(counts)
    first = 0
    while first < len(right_keys):
        done = ends[first] - counts[first]
        # At least one row, whose bucket may alone hold more than the limit.
        last = max(first + 1, int(np.searchsorted(ends, done + _COMPARED_AT_ONCE, side="right")))
        piece = counts[first:last]
        right_rows = np.repeat(np.arange(first, last), piece)
        # Position of each candidate within its bucket, then within the ordered keys.
        within = np.arange(len(right_rows)) - np.repeat(ends[first:last] - piece - done, piece)
        yield order[np.repeat(starts[first:last], piece) + within], right_rows
        first = last

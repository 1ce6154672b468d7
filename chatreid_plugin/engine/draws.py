"""Small draws from Python's own generator: many times faster than NumPy's for single numbers."""

import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt


# An array as a memoryview: compact like the array, and its items are plain ints.
Numbers = memoryview
_GUESSES = 8
_SMALLEST_SPARSE = 1 << 20


def view(numbers: npt.NDArray[np.integer]) -> Numbers:
    """Return an array of numbers as a memoryview of 64-bit integers."""
    return np.ascontiguousarray(numbers, dtype=np.int64).data


def number(*labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return numbers 0, 1, ... that are equal where all labels (from -1) are."""
    combined = np.zeros(len(labels[0]), dtype=np.int64)
    for codes in labels:
        # Numbered again each time, so that products stay far below 64 bits.
        combined = combined * (int(codes.max(initial=0)) + 2) + codes + 1
        if combined.max(initial=0) > _SMALLEST_SPARSE + 4 * len(combined):
            combined = np.unique(combined, return_inverse=True)[1]
        else:
            # Sorting is ten times slower than counting, as long as there is a place for every label.
            combined = (np.cumsum(np.bincount(combined) > 0) - 1)[combined]
    return combined


class Groups:
    """Rows by label, compactly: no object per group, so that a million identities cost no more than a million rows.

    Attributes:
        labels: the label of each row, from 0.
    """

    def __init__(self, labels: npt.NDArray[np.int64], members: npt.NDArray[np.int64] | None = None) -> None:
        """Group rows by label.

        Args:
            labels: one for each row, numbers from -1.
            members: what stands in the groups instead of the rows' own numbers.
        """
        labels = number(labels)
        order = np.argsort(labels, kind="stable")
        self.labels = view(labels)
        self._order = view(order if members is None else members[order])
        self._starts = view(np.concatenate([[0], np.cumsum(np.bincount(labels))]))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def list_alike(self, row: int) -> Numbers:
        """Return the rows (or members) with the same label as ``row``, in their order."""
        label = self.labels[row]
        return self._order[self._starts[label] : self._starts[label + 1]]


def pick(rng: random.Random, options: Sequence[int] | Numbers) -> int:
    """Return one of the options."""
    return options[int(rng.random() * len(options))]


def draw_among(
    rng: random.Random,
    among: Sequence[int] | Numbers,
    accept: Callable[[int], bool],
    count: int,
    taken: Iterable[int] = (),
    look_at_all: bool = True,
) -> list[int]:
    """Return up to ``count`` different accepted options that are not ``taken``, in random order.

    Guesses first, since nearly every option is accepted and there may be a million.

    Args:
        rng: the source of randomness.
        among: the options, without repeats.
        accept: says whether an option will do.
        count: how many are wanted.
        taken: options that are not wanted.
        look_at_all: look at every option when guessing does not find enough; else fewer are returned.
    """
    avoided = set(taken)
    chosen: list[int] = []
    if not among:
        return chosen
    for _ in range(_GUESSES * count):
        if len(chosen) == count:
            return chosen
        option = pick(rng, among)
        if option not in avoided and accept(option):
            avoided.add(option)
            chosen.append(option)
    if look_at_all and len(chosen) < count:
        left = [option for option in among if option not in avoided and accept(option)]
        chosen += rng.sample(left, min(count - len(chosen), len(left)))
    return chosen

"""What the recipe intends for gallery sizes, matches and yes/no answers, and whether the records agree with it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from ...config import GallerySettings
from ...tasks import LETTER_KINDS, Task
from ..sampler import compute_size_probabilities
from .counts import IntArray


FloatArray = npt.NDArray[np.float64]
Verdict = Literal["as intended", "limited by data", "differs", "too few records"]

# A page has about twenty tests: at 0.05 every page would raise an alarm, at 0.001 one page in fifty does.
SIGNIFICANCE = 0.001
# The same for a normal deviation, roughly, and room for the rounding of sums of shares.
SPREAD = 3
ROUNDING = 1e-9
# The chi-square distribution is a fair approximation from five expected records a class on (Cochran 1954).
SMALLEST_CLASS = 5


@dataclass(frozen=True, slots=True)
class Comparison:
    """Counted against intended.

    Attributes:
        counts: value -> number of records.
        expected: value -> number of records that the recipe intends.
        p_value: of the chi-square test; None if there are too few records for one.
        verdict: ``as intended``; ``limited by data`` if the test fails because values are smaller than intended, which
            happens where an identity has too few images or the token budget left some out; else ``differs``.
    """

    counts: dict[int, int]
    expected: dict[int, float]
    p_value: float | None
    verdict: Verdict


def compute_gallery_probabilities(gallery: GallerySettings, smallest: int | None) -> FloatArray:
    """Return P(N) by N from 0: uniform (paper section 3.2), or by the law of n where the task draws n."""
    if smallest is not None:
        rows = compute_size_probabilities(gallery.min_size, gallery.max_size, smallest, gallery.matches)
        return np.array([sum(row) for row in rows])
    probabilities = np.zeros(gallery.max_size + 1)
    probabilities[gallery.min_size :] = 1 / (gallery.max_size - gallery.min_size + 1)
    return probabilities


def find_smallest_matches(task: Task) -> int | None:
    """Return the least n of a task that draws it (equation 1): 2 in Stage 2, 1 in Stage 3; None for other tasks.

    Sources: paper section 3.2 for Stage 2, section 3.1.3 for Stage 3. Text-to-image one-to-many has one right answer.
    """
    if task.answer_kind not in LETTER_KINDS:
        return None
    if 3 in task.stages:
        return 1
    return 2 if task.name == "image_to_image_many_to_many" else None


def compute_match_probabilities(gallery: GallerySettings, smallest: int) -> FloatArray:
    """Return P(n) by n from 0, over all gallery sizes."""
    rows = compute_size_probabilities(gallery.min_size, gallery.max_size, smallest, gallery.matches)
    return np.array([sum(row[n] for row in rows[n:]) for n in range(len(rows))])


def compare(counts: IntArray, probabilities: FloatArray) -> Comparison:
    """Compare counted values with their intended distribution.

    Args:
        counts: (K,) records by value, from 0.
        probabilities: (L,) intended share of each value, from 0; longer or shorter than ``counts``.
    """
    length = max(len(counts), len(probabilities))
    counts = np.pad(counts, (0, length - len(counts)))
    expected = np.pad(probabilities, (0, length - len(probabilities))) * counts.sum()
    p_value = compute_p_value(counts, expected)
    verdict: Verdict = "as intended"
    if p_value is None:
        verdict = "too few records"
    elif p_value < SIGNIFICANCE:
        verdict = "differs" if _exceeds(counts, expected) else "limited by data"
    shown = np.flatnonzero((counts > 0) | (expected > 0)).tolist()
    return Comparison(
        counts={value: int(counts[value]) for value in shown},
        expected={value: round(float(expected[value]), 2) for value in shown},
        p_value=p_value,
        verdict=verdict,
    )


def _exceeds(counts: IntArray, expected: FloatArray) -> bool:
    """Return whether, for some k, more records have k or more than intended, beyond chance.

    Values that were cut down never do: what is missing at the upper end is found below it. The mean would not tell:
    in a small set chance may raise it by more than the cutting lowers it.
    """
    total = counts.sum()
    reached, intended = (np.cumsum(values[::-1])[::-1] for values in (counts, expected))
    deviation = np.sqrt(np.maximum(intended * (1 - intended / total), 0))
    return bool((reached - intended > SPREAD * deviation + ROUNDING * total).any())


def compare_yes_no(right: int, wrong: int) -> Comparison:
    """Compare yes (1) and no (0) with half each (paper section 3.1.2)."""
    found = compare(np.array([wrong, right]), np.array([0.5, 0.5]))
    # No shortage of images makes an answer no: either way the coin was not fair.
    verdict: Verdict = "differs" if found.verdict == "limited by data" else found.verdict
    return Comparison(found.counts, found.expected, found.p_value, verdict)


def compute_p_value(counts: IntArray, expected: FloatArray) -> float | None:
    """Return the p-value of Pearson's chi-square test, small classes pooled; None if fewer than two classes remain.

    A value that the recipe cannot give makes it 0; a recipe that allows one value only is met then, which is 1.
    """
    if counts[expected == 0].sum() > 0:
        return 0.0
    if np.count_nonzero(expected) == 1:
        return 1.0
    large = expected >= SMALLEST_CLASS
    counts = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    # What was pooled may still be nothing, or too little to stand alone.
    if expected[-1] < SMALLEST_CLASS:
        if len(expected) < 3:
            return None
        counts[-2] += counts[-1]
        expected[-2] += expected[-1]
        counts, expected = counts[:-1], expected[:-1]
    return float(stats.chisquare(counts, expected).pvalue) if len(expected) > 1 else None

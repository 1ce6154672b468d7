"""Draw identities, galleries and pairs from the training images: who is asked about, who else is shown.

Gallery sizes and numbers of matches follow the paper (section 3.2, equation 1).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..config import GallerySettings
from ..errors import DataError
from ..images import ImagePolicy, count_visual_tokens
from ..records import ImageRecord


Indices = npt.NDArray[np.int64]

# Attribute whose equality makes a negative "hard": the largest coloured area of a person.
HARD_ATTRIBUTE = "upper_colour"


@lru_cache(maxsize=64)
def compute_match_probabilities(
    gallery_size: int, smallest: int, kind: Literal["inverse", "uniform"]
) -> tuple[float, ...]:
    """Return P(n = k) for k from ``smallest`` to ``gallery_size``, summing to 1.

    ``inverse``: proportional to 1/(k-1), the reading of equation 1 drawn by inverse transform; k = 1 (allowed in
    Stage 3 only) weighs as much as k = 2. ``uniform``: 1/(N-1) for each.
    """
    numbers = np.arange(smallest, gallery_size + 1)
    weights = 1.0 / np.maximum(numbers - 1, 1) if kind == "inverse" else np.ones(len(numbers))
    return tuple((weights / weights.sum()).tolist())


class ImagePool:
    """The training images of one data set, indexed for drawing.

    Attributes:
        records: the images; all draws return positions in this list.
        tokens: visual tokens of each image under the stage's policy.
        positives: for each image, how many images of the same person other cameras have.
    """

    def __init__(self, records: Sequence[ImageRecord], policy: ImagePolicy) -> None:
        """Index the images.

        Args:
            records: training images of one data set.
            policy: the image policy of the stage they are drawn for.
        """
        self.records = list(records)
        self.tokens = np.array([count_visual_tokens(r.width, r.height, policy) for r in records], dtype=np.int64)
        self._person = _number([record.person_id for record in records])
        self._camera = _number([record.camera_id for record in records])
        self._colour = _number([record.attributes.get(HARD_ATTRIBUTE, "") for record in records])
        self._attributes = _number([repr(sorted(record.attributes.items())) for record in records])
        self._by_person = _group(self._person)
        self._by_camera = _group(self._camera)
        self.positives = np.array([len(self.list_positives(i)) for i in range(len(records))], dtype=np.int64)
        self._by_positives = np.argsort(-self.positives, kind="stable")
        self.captioned = np.flatnonzero([bool(record.captions) for record in records])
        self.attributed = np.flatnonzero([bool(record.attributes) for record in records])

    def list_positives(self, image: int) -> Indices:
        """Return the images of the same person taken by other cameras."""
        same = self._by_person[self._person[image]]
        return same[self._camera[same] != self._camera[image]]

    def draw_query(self, rng: np.random.Generator, matches: int) -> int:
        """Return an image with at least ``matches`` cross-camera positives (at most what the data set has)."""
        wanted = min(matches, int(self.positives.max()))
        candidates = int(np.searchsorted(-self.positives[self._by_positives], -wanted, side="right"))
        return int(self._by_positives[rng.integers(candidates)])

    def draw_positives(self, rng: np.random.Generator, query: int, count: int) -> list[int]:
        """Return up to ``count`` different cross-camera images of the query's person."""
        positives = self.list_positives(query)
        return rng.choice(positives, size=min(count, len(positives)), replace=False).tolist()

    def draw_negatives(self, rng: np.random.Generator, query: int, count: int, hard_share: float) -> list[int]:
        """Return ``count`` different images of other people.

        A share of them is hard: taken by the query's camera and, where attributes are known, with the same colour of
        the upper clothing.
        """
        chosen: dict[int, None] = {}
        same_camera = self._by_camera[self._camera[query]]
        for attempt in range(20 * count + 100):
            if len(chosen) == count:
                break
            hard = rng.random() < hard_share
            candidates = same_camera if hard else None
            image = int(rng.choice(candidates) if candidates is not None else rng.integers(len(self.records)))
            if self._person[image] == self._person[query]:
                continue
            # The colour is a preference: after a while any other person of that camera will do.
            if hard and self._colour[image] != self._colour[query] and attempt < 10 * count:
                continue
            chosen[image] = None
        return list(chosen)

    def draw_unlike(self, rng: np.random.Generator, image: int, count: int, among: Indices) -> list[int]:
        """Return up to ``count`` different images of other people whose attributes differ from the image's."""
        chosen: dict[int, None] = {}
        for _ in range(20 * count + 100):
            if len(chosen) == count:
                break
            other = int(among[rng.integers(len(among))])
            same_looks = self.records[image].attributes and self._attributes[other] == self._attributes[image]
            if self._person[other] != self._person[image] and not same_looks:
                chosen[other] = None
        return list(chosen)


def _number(labels: Sequence[str]) -> Indices:
    return np.unique(np.asarray(labels), return_inverse=True)[1].astype(np.int64)


def _group(numbers: Indices) -> list[Indices]:
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)


def draw_gallery(
    pool: ImagePool,
    rng: np.random.Generator,
    settings: GallerySettings,
    token_budget: int,
    smallest_matches: int,
) -> tuple[int, list[int], list[int]]:
    """Draw a query with a gallery: N uniform in [min_size, max_size], n matches by equation 1, in random order.

    Args:
        pool: the images.
        rng: the only source of randomness.
        settings: sizes, distribution of n, share of hard negatives.
        token_budget: visual tokens of query and gallery together; negatives beyond it are left out, then matches.
        smallest_matches: least number of matches: 2 in Stage 2 (equation 1), 1 in Stage 3 (section 3.1.3).

    Returns:
        The query, the gallery, and the positions of the matches in the gallery.

    Raises:
        DataError: not even a query and one match fit the budget.
    """
    size = int(rng.integers(settings.min_size, settings.max_size + 1))
    smallest = min(smallest_matches, size)
    probabilities = compute_match_probabilities(size, smallest, settings.matches)
    matches = smallest + int(np.searchsorted(np.cumsum(probabilities), rng.random()))
    query = pool.draw_query(rng, min(matches, size))
    positives = pool.draw_positives(rng, query, min(matches, size))
    negatives = pool.draw_negatives(rng, query, size - len(positives), settings.hard_negatives)
    images = positives + negatives
    used = int(pool.tokens[query]) + np.cumsum(pool.tokens[images])
    kept = int(np.searchsorted(used, token_budget, side="right"))
    if kept == 0:
        raise DataError(
            f"cutoff_len leaves {token_budget} visual tokens, but a query and one match take {used[0]}. "
            "Raise cutoff_len."
        )
    order = rng.permutation(kept)
    gallery = [images[i] for i in order]
    return query, gallery, [position for position, i in enumerate(order) if i < len(positives)]

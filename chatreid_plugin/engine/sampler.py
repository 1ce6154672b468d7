"""Draw identities, galleries and pairs from the training images: who is asked about, who else is shown.

Gallery sizes and numbers of matches follow the paper (section 3.2, equation 1).
"""

import copy
from collections.abc import Callable, Sequence
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
        self.tokens = self._count_tokens(policy)
        self._person = _number([record.person_id for record in records])
        self._camera = _number([record.camera_id for record in records])
        self._colour = _number([record.attributes.get(HARD_ATTRIBUTE, "") for record in records])
        self._looks = _number([repr(sorted(record.attributes.items())) for record in records])
        self._by_person = _group(self._person)
        self._by_camera = _group(self._camera)
        self.positives = np.array([len(self.list_positives(i)) for i in range(len(records))], dtype=np.int64)
        self._all = np.arange(len(records), dtype=np.int64)
        self._by_positives = np.argsort(-self.positives, kind="stable")
        self._fewer_positives = -self.positives[self._by_positives]
        self.captioned = np.flatnonzero([bool(record.captions) for record in records])
        self.attributed = np.flatnonzero([bool(record.attributes) for record in records])

    def _count_tokens(self, policy: ImagePolicy) -> Indices:
        return np.array([count_visual_tokens(r.width, r.height, policy) for r in self.records], dtype=np.int64)

    def count_under(self, policy: ImagePolicy) -> "ImagePool":
        """Return this pool for another stage: the same index, tokens counted under the stage's policy."""
        pool = copy.copy(self)
        pool.tokens = self._count_tokens(policy)
        return pool

    def list_positives(self, image: int) -> Indices:
        """Return the images of the same person taken by other cameras."""
        same = self._by_person[self._person[image]]
        return same[self._camera[same] != self._camera[image]]

    def draw_query(self, rng: np.random.Generator, matches: int) -> int:
        """Return an image with at least ``matches`` cross-camera positives (at most what the data set has)."""
        wanted = min(matches, int(self.positives.max()))
        candidates = int(np.searchsorted(self._fewer_positives, -wanted, side="right"))
        return int(self._by_positives[rng.integers(candidates)])

    def draw_positives(self, rng: np.random.Generator, query: int, count: int) -> list[int]:
        """Return up to ``count`` different cross-camera images of the query's person."""
        positives = self.list_positives(query)
        return rng.choice(positives, size=min(count, len(positives)), replace=False).tolist()

    def draw_negatives(self, rng: np.random.Generator, query: int, count: int, hard_share: float) -> list[int]:
        """Return up to ``count`` different images of other people, in random order.

        A share of them is hard: taken by the query's camera and, as long as there are such, with the same colour of
        the upper clothing. Fewer are returned only if the data set has no more.
        """
        chosen = self._draw_hard(rng, query, int(rng.binomial(count, hard_share)))
        chosen += self._draw_among(
            rng, self._all, lambda images: self._person[images] != self._person[query], count, chosen
        )
        return [chosen[i] for i in rng.permutation(len(chosen))]

    def _draw_hard(self, rng: np.random.Generator, query: int, count: int) -> list[int]:
        if count == 0:
            return []
        others = self._by_camera[self._camera[query]]
        others = others[self._person[others] != self._person[query]]
        # Shuffled, then sorted by colour, which keeps the random order among equals.
        others = rng.permutation(others)
        return others[np.argsort(self._colour[others] != self._colour[query], kind="stable")][:count].tolist()

    def draw_unlike(self, rng: np.random.Generator, image: int, count: int, among: Indices) -> list[int]:
        """Return up to ``count`` different images of other people who look different.

        Different is who has other attributes, where they are known, and no caption in common. Fewer are returned only
        if there are no more.
        """
        captions = set(self.records[image].captions)

        def is_unlike(images: Indices) -> npt.NDArray[np.bool_]:
            unlike = self._person[images] != self._person[image]
            if self.records[image].attributes:
                unlike &= self._looks[images] != self._looks[image]
            if captions:
                unlike &= np.array([captions.isdisjoint(self.records[i].captions) for i in images], dtype=np.bool_)
            return unlike

        return self._draw_among(rng, among, is_unlike, count, [])

    @staticmethod
    def _draw_among(
        rng: np.random.Generator,
        among: Indices,
        accept: Callable[[Indices], npt.NDArray[np.bool_]],
        count: int,
        taken: Sequence[int],
    ) -> list[int]:
        """Return different accepted images that fill ``taken`` up to ``count``.

        Guesses first, since nearly every image is accepted and a data set may have a million; then looks at all.
        """
        chosen = dict.fromkeys(taken)
        missing = count - len(taken)
        if missing > 0 and len(among):
            for image in among[rng.integers(len(among), size=4 * missing)]:
                if len(chosen) < count and int(image) not in chosen and accept(np.array([image]))[0]:
                    chosen[int(image)] = None
        if len(chosen) < count:
            left = among[accept(among)]
            left = left[~np.isin(left, list(chosen))]
            chosen |= dict.fromkeys(rng.permutation(left)[: count - len(chosen)].tolist())
        return list(chosen)[len(taken) :]

    def count_people(self) -> int:
        """Return the number of identities."""
        return len(self._by_person)

    def has_unlike(self, among: Indices) -> bool:
        """Return whether ``among`` holds two images of different people who differ in attributes, where known."""
        if len(np.unique(self._person[among])) < 2:
            return False
        return len(np.unique(self._looks[among])) > 1 or not self.records[int(among[0])].attributes


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

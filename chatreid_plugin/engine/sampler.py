"""Draw identities, galleries and pairs from the training images: who is asked about, who else is shown.

Gallery sizes and numbers of matches follow the paper (section 3.2, equation 1).
"""

import copy
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np

from ..archives import Array
from ..config import Change, GallerySettings, MatchLaw
from ..images import ImagePolicy
from .look_alikes import Appearances, LookAlikes, Nearest, find_nearest
from .pool import Codes, Groups, ImageTable, Numbers, SourceRows, draw_among, number, pick, view


# Attribute whose equality makes a negative "hard": the largest coloured area of a person.
HARD_ATTRIBUTE = "upper_colour"

# "Users typically possess only fragmented information, such as a person wearing a blue top": few attributes, not all.
MOST_ATTRIBUTES = 3

# What stands against each change where no image has a match that differs so.
NO_MATCHES: dict[Change, str] = {
    "any": "no identity with two images",
    "camera": "no identity seen by two cameras",
    "clothes": "no identity in two outfits and two cameras",
    "modality": "no identity both visible and infrared",
}


@lru_cache(maxsize=64)
def compute_size_probabilities(least: int, most: int, smallest: int, law: MatchLaw) -> tuple[tuple[float, ...], ...]:
    """Return P(N, n): row N from 0 to ``most``, in it n from 0 to N; all of it sums to 1.

    The paper (section 3.2) draws N uniformly and n by its equation 1, P(n = k) = 1/(k-1) for k in 2..N, "ensuring that
    the probability of recording any number eventually is uniform across all numbers". As printed equation 1 is no
    distribution (it sums to more than 1 from N = 3 on), and no reading of it makes n uniform:

    - ``uniform_overall``: n first, uniform from ``smallest`` to ``most``, then N uniform from max(n, ``least``) to
      ``most``. n is uniform, as the paper wants it; N leans to large galleries.
    - ``inverse``: N uniform, n with probability proportional to 1/(k-1), k = 1 (Stage 3 only) as often as k = 2. n is
      mostly 2.
    - ``uniform``: N uniform, n uniform from ``smallest`` to N. n leans to small numbers, less than ``inverse``.

    Args:
        least: smallest gallery.
        most: largest gallery.
        smallest: least number of matches.
        law: one of the three.
    """
    joint = np.zeros((most + 1, most + 1))
    if law == "uniform_overall":
        for n in range(smallest, most + 1):
            sizes = range(max(n, least), most + 1)
            joint[sizes.start :, n] = 1.0 / len(sizes)
    else:
        for size in range(least, most + 1):
            numbers = np.arange(min(smallest, size), size + 1)
            weights = 1.0 / np.maximum(numbers - 1, 1) if law == "inverse" else np.ones(len(numbers))
            joint[size, numbers] = weights / weights.sum()
    joint /= joint.sum()
    return tuple(tuple(row[: size + 1].tolist()) for size, row in enumerate(joint))


@lru_cache(maxsize=64)
def _list_sizes(
    least: int, most: int, smallest: int, law: MatchLaw
) -> tuple[tuple[tuple[int, int], ...], tuple[float, ...]]:
    """Return all pairs (N, n) that may be drawn, and the sums of their probabilities up to each."""
    rows = compute_size_probabilities(least, most, smallest, law)
    pairs = [((size, n), p) for size, row in enumerate(rows) for n, p in enumerate(row) if p > 0]
    return tuple(pair for pair, _ in pairs), tuple(accumulate(p for _, p in pairs))


def draw_sizes(rng: random.Random, settings: GallerySettings, smallest: int) -> tuple[int, int]:
    """Return the size N of a gallery and its number of matches n, at least ``smallest``, by inverse transform."""
    pairs, bounds = _list_sizes(settings.min_size, settings.max_size, smallest, settings.matches)
    return pairs[min(bisect_right(bounds, rng.random()), len(pairs) - 1)]


def draw_gallery_size(rng: random.Random, settings: GallerySettings) -> int:
    """Return N, uniform in [min_size, max_size] (paper section 3.2), for tasks with one right image."""
    return rng.randint(settings.min_size, settings.max_size)


class Queries:
    """Images sorted by how many matches they have, so that one with enough of them is drawn at once.

    Attributes:
        matches: for each image, how many matches there are; 0 for images that cannot be queries.
        most: the largest number of matches.
    """

    def __init__(self, matches: Codes) -> None:
        order = np.argsort(-matches, kind="stable")
        self.matches = view(matches)
        self.most = int(matches.max(initial=0))
        self._rows = view(order)
        self._fewer = view(-matches[order])

    def draw(self, rng: random.Random, matches: int) -> int:
        """Return an image with at least ``matches`` matches (at most what the data set has)."""
        candidates = bisect_right(self._fewer, -min(matches, self.most))
        return pick(rng, self._rows[:candidates])


class ImagePool:
    """The training images of one source, indexed for drawing; images are numbered from 0.

    Attributes:
        name: of the source.
        table: the images of all sources.
        first: row of the pool's first image in the table.
        tokens: visual tokens of each image under the stage's policy.
        captioned: images with captions.
        attributed: images with attributes.
        caption_tokens: about how many tokens each caption of the table takes.
        attribute_tokens: about how many tokens each attribute of the table takes.
        attribute_codes: equal where attributes of the table have the same name and value.
        caption_codes: equal where captions of the table are.
        queries: for each change, the images with matches.
        changes: shares of what matches differ in, for pairs and galleries that are of no setting of their own.
        described_queries: images with captions, and how many images show the same person, themselves included.
        multimodal_queries: images of people who are described in other words too, and how many matches other cameras
            have.
        caption_openings: images with captions, of people seen in another image and known by more, other words or
            attributes; and how many images show the same person, themselves included.
        attribute_openings: images with attributes, of people seen in another image and known by more than one of them.
    """

    def __init__(self, table: ImageTable, source: SourceRows, policy: ImagePolicy | None = None) -> None:
        """Index the images of one source; without a policy, ``count_under`` has to be called before drawing."""
        self.name, self.first, self.size = source.name, source.first, source.last - source.first
        self.table, self._rows = table, slice(source.first, source.last)
        self.everything = view(np.arange(self.size))
        self.changes: dict[Change, float] = {"camera": 1.0}
        self._index_labels()
        nearest = table.list_look_alikes(self._rows)
        self._look_alikes = None if nearest is None else LookAlikes(self.appearances, nearest)
        self._index_descriptions()
        self.tokens = view(table.count_tokens(policy)[self._rows]) if policy else view(np.zeros(0, dtype=np.int64))

    def count_under(self, policy: ImagePolicy) -> "ImagePool":
        """Return this pool for another stage: the same index, tokens counted under the stage's policy."""
        pool = copy.copy(self)
        pool.tokens = view(self.table.count_tokens(policy)[self._rows])
        return pool

    def with_changes(self, changes: Mapping[Change, float]) -> "ImagePool":
        """Return this pool with other shares of what matches differ in."""
        pool = copy.copy(self)
        pool.changes = dict(changes)
        return pool

    def list_changes(self) -> list[Change]:
        """Return the changes with a share that some image has a match for."""
        return [change for change, share in self.changes.items() if share > 0 and self.queries[change].most > 0]

    def draw_change(self, rng: random.Random) -> Change:
        """Return in what the matches of a record differ from its query, by the shares of those that are there."""
        possible = self.list_changes()
        if len(possible) == 1:
            return possible[0]
        return rng.choices(possible, [self.changes[change] for change in possible])[0]

    def _index_labels(self) -> None:
        labels = (self.table.encode(name, self._rows) for name in ("person_id", "camera_id", "clothes_id", "modality"))
        person, camera, clothes, modality = labels
        self.people = Groups(person)
        # Of one modality, since a camera may see both.
        self._by_camera = Groups(number(camera, modality))
        self._camera, self._clothes, self._modality = view(camera), view(clothes), view(modality)
        self._rows_of_modality = {int(m): view(np.flatnonzero(modality == m)) for m in np.unique(modality)}
        known = clothes >= 0
        seen, worn = [person[known], modality[known]], clothes[known]
        changed = np.zeros(self.size, dtype=np.int64)
        changed[known] = _count_equal(*seen) - _count_equal(*seen, camera[known])
        changed[known] -= _count_equal(*seen, worn) - _count_equal(*seen, worn, camera[known])
        own, crossed = _count_equal(person, modality), _count_equal(person) - _count_equal(person, modality)
        # Where nobody else is seen in a modality, there is no gallery to choose from.
        alone, alone_across = own == _count_equal(modality), crossed == self.size - _count_equal(modality)
        self.queries: dict[Change, Queries] = {
            "any": Queries(np.where(alone, 0, own - 1)),
            "camera": Queries(np.where(alone, 0, own - _count_equal(person, modality, camera))),
            "clothes": Queries(np.where(alone, 0, changed)),
            "modality": Queries(np.where(alone_across, 0, crossed)),
        }

    def _index_descriptions(self) -> None:
        table, rows = self.table, self._rows
        upto = slice(rows.start, rows.stop + 1)
        self.caption_starts = view(table.caption_starts[upto])
        self.attribute_starts = view(table.attribute_starts[upto])
        has_caption = np.diff(table.caption_starts[upto]) > 0
        known = np.diff(table.attribute_starts[upto])
        self.captioned = view(np.flatnonzero(has_caption))
        self.attributed = view(np.flatnonzero(known > 0))
        self._looks = Groups(table.looks[rows])
        self._index_colours(table.encode_attribute(HARD_ATTRIBUTE)[rows])
        self.caption_codes = view(table.caption_codes)
        self.caption_tokens, self.attribute_tokens = view(table.caption_tokens), view(table.attribute_tokens)
        self.attribute_codes = view(table.attribute_codes)
        owners = np.repeat(np.arange(self.size), np.diff(table.attribute_starts[upto]))
        codes = table.attribute_codes[self.attribute_starts[0] : self.attribute_starts[self.size]]
        self._owners = Groups(codes, owners)
        person = np.asarray(self.people.labels)
        shown = _count_equal(person)
        self.described_queries = Queries(np.where(has_caption, shown, 0))
        owners = np.repeat(np.arange(self.size), np.diff(table.caption_starts[upto]))
        codes = table.caption_codes[self.caption_starts[0] : self.caption_starts[self.size]]
        # An image's captions are among its person's, so that there are others where there are more.
        others = _count_distinct(person[owners], codes, len(self.people))[person] > _count_distinct(
            owners, codes, self.size
        )
        self.multimodal_queries = Queries(np.where(others, np.asarray(self.queries["camera"].matches), 0))
        self.caption_openings = Queries(np.where((shown > 1) & has_caption & (others | (known > 0)), shown, 0))
        self.attribute_openings = view(np.flatnonzero((shown > 1) & ((known > 1) | ((known > 0) & others))))

    def _index_colours(self, colour: Codes) -> None:
        """Group the images by camera and colour, so that those of any camera in any colour are found."""
        self._colour, self._colours = view(colour), int(colour.max(initial=0)) + 2
        keys = np.asarray(self._by_camera.labels) * self._colours + colour + 1
        self._by_camera_and_colour = Groups(keys)
        unique, first = np.unique(keys, return_index=True)
        self._look_keys, self._look_rows = view(unique), view(first)

    @cached_property
    def appearances(self) -> Appearances:
        """In which cameras, of one modality, each person is seen."""
        return Appearances(np.asarray(self.people.labels), np.asarray(self._by_camera.labels))

    def find_look_alikes(self, features: Array) -> Nearest:
        """Return who looks like whom by the features (N, D) of the pool's images, for ``ImageTable``."""
        return find_nearest(self.appearances, np.asarray(self._by_camera.labels), features, self.name)

    def _list_looking(self, camera_of: int, looks_of: int) -> Numbers | Sequence[int]:
        """Return the images of one image's camera (and modality) that look like another one, if that is known.

        That is by features where there are some, else in the same colour. The two images show one person.
        """
        if self._look_alikes is not None:
            return self._look_alikes.list_alike(looks_of, self._by_camera.labels[camera_of])
        colour = self._colour[looks_of]
        key = self._by_camera.labels[camera_of] * self._colours + colour + 1
        place = bisect_left(self._look_keys, key)
        if colour < 0 or place == len(self._look_keys) or self._look_keys[place] != key:
            return ()
        return self._by_camera_and_colour.list_alike(self._look_rows[place])

    def list_captions(self, image: int) -> range:
        """Return the numbers of an image's captions among all captions of the table."""
        return range(self.caption_starts[image], self.caption_starts[image + 1])

    def list_other_words(self, image: int) -> list[int]:
        """Return the numbers of captions that say more of the person than the image's own: never one of its own.

        They come from images of the same person in other clothes; where there are none, from another camera, and only
        then from other images of the same camera. Users add words where the image does not tell (paper section 3.3).
        """
        known, clothes, camera = self.get_caption_codes(image), self._clothes[image], self._camera[image]
        words: list[list[int]] = [[], [], []]
        for other in self.people.list_alike(image):
            rank = 0 if 0 <= self._clothes[other] != clothes >= 0 else 1 if self._camera[other] != camera else 2
            words[rank] += [number for number in self.list_captions(other) if self.caption_codes[number] not in known]
        return next(filter(None, words), [])

    def list_attributes(self, image: int) -> range:
        """Return the numbers of an image's attributes among all attributes of the table."""
        return range(self.attribute_starts[image], self.attribute_starts[image + 1])

    def get_attribute_codes(self, image: int) -> frozenset[int]:
        """Return the codes of an image's attributes."""
        return frozenset(self.attribute_codes[self.attribute_starts[image] : self.attribute_starts[image + 1]])

    def list_owners(self, attribute: int) -> Numbers:
        """Return the images that have the attribute (name and value) of this number of the table."""
        return self._owners.list_alike(attribute - self.attribute_starts[0])

    def list_positives(self, image: int, change: Change = "camera") -> list[int]:
        """Return the other images of the same person that differ from this one as the setting asks."""
        same, modality, camera = self.people.list_alike(image), self._modality[image], self._camera[image]
        if change == "modality":
            return [i for i in same if self._modality[i] != modality]
        if change == "any":
            return [i for i in same if i != image and self._modality[i] == modality]
        others = [i for i in same if self._camera[i] != camera and self._modality[i] == modality]
        if change == "camera":
            return others
        return [i for i in others if 0 <= self._clothes[i] != self._clothes[image]]

    def is_other_person(self, image: int, other: int) -> bool:
        """Return whether two images show different people."""
        return self.people.labels[image] != self.people.labels[other]

    def draw_negatives(
        self, rng: random.Random, query: int, count: int, hard_share: float, positives: Sequence[int]
    ) -> list[int]:
        """Return up to ``count`` different images of other people, in random order.

        Each is of the camera (and modality) of one of the positives, drawn anew: cameras say nothing about who it is.
        Were they drawn from all cameras, "the query's camera: No" could be learnt, since matches are from others. Of
        those of that camera a share is hard: one of those who look most like the query by its features
        (``look_alikes``), else in the colour that the query wears above, as long as there are such; across modalities
        like the positive, since infrared hides colours. Where a camera shows nobody else, another
        camera than the query's takes its place, and fewer are returned only if the data set has no more.

        Args:
            rng: the source of randomness.
            query: whose person is left out.
            count: how many.
            hard_share: probability of each to be hard.
            positives: all matches of the query, at least one.
        """

        def is_negative(image: int) -> bool:
            return self.is_other_person(image, query)

        chosen: list[int] = []
        for _ in range(count):
            like = pick(rng, positives)
            worn = query if self._modality[like] == self._modality[query] else like
            hard = self._list_looking(like, worn) if rng.random() < hard_share else ()
            found = draw_among(rng, hard, is_negative, 1, chosen)
            chosen += found or draw_among(rng, self._by_camera.list_alike(like), is_negative, 1, chosen)
        if len(chosen) < count:
            among = self._rows_of_modality[self._modality[positives[0]]]
            camera = self._camera[query]
            missing = count - len(chosen)
            chosen += draw_among(rng, among, lambda i: is_negative(i) and self._camera[i] != camera, missing, chosen)
            chosen += draw_among(rng, among, is_negative, count - len(chosen), chosen)
        rng.shuffle(chosen)
        return chosen

    def is_unlike(self, image: int, other: int) -> bool:
        """Return whether two images show different people who look different.

        Different is who has other attributes, where they are known, and no caption in common.
        """
        if not self.is_other_person(image, other):
            return False
        if self.list_attributes(image) and self._looks.labels[image] == self._looks.labels[other]:
            return False
        return self.get_caption_codes(image).isdisjoint(self.get_caption_codes(other))

    def get_caption_codes(self, image: int) -> frozenset[int]:
        """Return the codes of an image's captions."""
        return frozenset(self.caption_codes[self.caption_starts[image] : self.caption_starts[image + 1]])

    def draw_unlike(self, rng: random.Random, image: int, count: int, among: Sequence[int] | Numbers) -> list[int]:
        """Return up to ``count`` different images of ``among`` that are unlike ``image``; fewer only if there are."""
        return draw_among(rng, among, lambda other: self.is_unlike(image, other), count)

    def has_unlike(self, among: Sequence[int] | Numbers) -> bool:
        """Return whether ``among`` holds two images of different people who differ in attributes, where known."""
        images = np.asarray(among)
        people, looks = np.asarray(self.people.labels)[images], np.asarray(self._looks.labels)[images]
        if people.min() == people.max():
            return False
        return looks.min() < looks.max() or not self.list_attributes(int(images[0]))


def _count_equal(*labels: Codes) -> Codes:
    """Return for each row how many rows have the same labels, itself included."""
    numbers = number(*labels)
    return np.bincount(numbers)[numbers]


def _count_distinct(owners: Codes, codes: Codes, size: int) -> Codes:
    """Return for each owner from 0 to ``size`` how many different codes it has."""
    first = np.unique(number(owners, codes), return_index=True)[1]
    return np.bincount(owners[first], minlength=size)


def draw_gallery(
    pool: ImagePool,
    rng: random.Random,
    settings: GallerySettings,
    smallest_matches: int,
    change: Change = "camera",
    queries: Queries | None = None,
) -> tuple[int, list[int], list[int]]:
    """Draw a query with its gallery of N images, n of them matches (``compute_size_probabilities``).

    Args:
        pool: the images.
        rng: the only source of randomness.
        settings: sizes, distribution of n, share of hard negatives.
        smallest_matches: least number of matches: 2 in Stage 2 (equation 1), 1 in Stage 3 (section 3.1.3).
        change: in what a match differs from the query.
        queries: which images may be the query; None: all that have matches.

    Returns:
        The query, its matches and the other images, each in random order; fewer matches than drawn if the data set
        has no more, then more of the others.
    """
    size, matches = draw_sizes(rng, settings, smallest_matches)
    query = (queries or pool.queries[change]).draw(rng, matches)
    positives = pool.list_positives(query, change)
    shown = rng.sample(positives, min(matches, len(positives)))
    return query, shown, pool.draw_negatives(rng, query, size - len(shown), settings.hard_negatives.share, positives)


@dataclass(frozen=True, slots=True)
class AttributeQuery:
    """What is asked and who fits.

    Attributes:
        asked: numbers of the attributes asked for, in the table.
        matches: images that have all of them, at least one.
        others: images that lack one or more.
    """

    asked: list[int]
    matches: list[int]
    others: list[int]


def draw_asked(pool: ImagePool, rng: random.Random, image: int) -> list[int]:
    """Return the numbers of 1 to ``MOST_ATTRIBUTES`` attributes of an image."""
    own = pool.list_attributes(image)
    return sorted(rng.sample(own, rng.randint(1, min(MOST_ATTRIBUTES, len(own)))))


def make_check(pool: ImagePool, asked: Sequence[int]) -> Callable[[int], bool]:
    """Return a function that says whether an image has all attributes that are asked for."""
    wanted = {pool.attribute_codes[number] for number in asked}
    return lambda image: wanted <= pool.get_attribute_codes(image)


def find_rarest(pool: ImagePool, asked: Sequence[int]) -> Numbers:
    """Return the images that have the rarest of the attributes, among which are all that have every one."""
    return min((pool.list_owners(number) for number in asked), key=len)


def build_attribute_query(pool: ImagePool, rng: random.Random, matches: int, others: int) -> AttributeQuery:
    """Ask for 1 to ``MOST_ATTRIBUTES`` attributes of an image and draw images that have them, and that lack some.

    Args:
        pool: images with attributes.
        rng: the source of randomness.
        matches: how many images that match, at least 1; fewer are returned if they are hard to find.
        others: how many that do not, besides those that make up for missing matches.
    """
    image = pick(rng, pool.attributed)
    asked = draw_asked(pool, rng, image)
    has_all = make_check(pool, asked)
    # The search ends early, since some combinations are unique.
    rarest = find_rarest(pool, asked)
    fitting = [image, *draw_among(rng, rarest, has_all, matches - 1, [image], look_at_all=False)]
    lacking = draw_among(rng, pool.attributed, lambda other: not has_all(other), others + matches - len(fitting))
    return AttributeQuery(asked, fitting, lacking)

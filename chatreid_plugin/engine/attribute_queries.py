"""Attribute-based person retrieval (paper section 3.3): a few attributes ask, and images that have them all match."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .draws import Numbers, draw_among, pick
from .sampler import ImagePool


# "Users typically possess only fragmented information, such as a person wearing a blue top": few attributes, not all.
MOST_ATTRIBUTES = 3


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

"""Attribute-based person retrieval (paper section 3.3): a few attributes ask, and images that have them all match."""

import random
from dataclasses import dataclass

from .draws import draw_among, pick
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


def build_attribute_query(pool: ImagePool, rng: random.Random, matches: int, others: int) -> AttributeQuery:
    """Ask for 1 to ``MOST_ATTRIBUTES`` attributes of an image and draw images that have them, and that lack some.

    Args:
        pool: images with attributes.
        rng: the source of randomness.
        matches: how many images that match, at least 1; fewer are returned if they are hard to find.
        others: how many that do not, besides those that make up for missing matches.
    """
    image = pick(rng, pool.attributed)
    own = pool.list_attributes(image)
    asked = sorted(rng.sample(own, rng.randint(1, min(MOST_ATTRIBUTES, len(own)))))
    wanted = {pool.attribute_codes[number] for number in asked}

    def has_all(other: int) -> bool:
        numbers = pool.list_attributes(other)
        return wanted.issubset(pool.attribute_codes[numbers.start : numbers.stop])

    # Every fitting image has the rarest of the attributes; the search ends early, since some combinations are unique.
    candidates = min((pool.list_owners(number) for number in asked), key=len)
    fitting = [image, *draw_among(rng, candidates, has_all, matches - 1, [image], look_at_all=False)]
    lacking = draw_among(rng, pool.attributed, lambda other: not has_all(other), others + matches - len(fitting))
    return AttributeQuery(asked, fitting, lacking)

"""Adaptive retrieval (paper section 3.3): few words find some people, one is confirmed, then a detail is added.

"Beginning with attribute-based retrieval, if the correct match appears among the initial results, the user can use
that match as a new query to refine further results." The first turn asks with attributes, which other people may have
too, or with a caption, or with the captions of two people, of whom one is meant. The second confirms one of the images
found, adds another caption of the person or an attribute of all the person's images, and asks for these: some may not
have fitted the first words, and other people's that fitted are none of them. The third, where attributes tell the
person's images apart, adds one and keeps those that have it.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .pool import Draft, DraftTurn, draw_among, pick
from .sampler import ImagePool, draw_asked, find_rarest, make_check


@dataclass(frozen=True, slots=True)
class Opening:
    """The first turn, and who is shown.

    Attributes:
        captions: numbers of one or two captions that it asks with.
        attributes: or numbers of the attributes.
        person: images of the person who will be confirmed, that image first.
        others: images of other people, those that are found first.
        found: the images that fit what is asked.
    """

    captions: list[int]
    attributes: list[int]
    person: list[int]
    others: list[int]
    found: frozenset[int]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """An opening and what is added later.

    Attributes:
        opening: the first turn.
        caption: number of the caption that the second turn adds, or None.
        attribute: number of the attribute that it adds instead.
        kept_by: number of the attribute that the third turn adds; None if there is no third turn.
        kept: the person's images that have it.
        images: all that are shown, in the order in which they stay when there is no room for all.
    """

    opening: Opening
    caption: int | None
    attribute: int | None
    kept_by: int | None
    kept: frozenset[int]
    images: list[int]

    def list_captions(self) -> list[int]:
        """Return the numbers of all captions that are quoted."""
        return self.opening.captions + [number for number in (self.caption,) if number is not None]

    def list_attributes(self) -> list[int]:
        """Return the numbers of all attributes that are named."""
        return self.opening.attributes + [n for n in (self.attribute, self.kept_by) if n is not None]

    def place(self, gallery: Sequence[int]) -> Draft:
        """Return the record of a gallery of some of the images, in its order; the first two are among them."""
        places = {image: place for place, image in enumerate(gallery)}

        def locate(images: Iterable[int]) -> list[int]:
            return sorted(places[image] for image in images if image in places)

        person = locate(self.opening.person)
        turns = [DraftTurn(person, places[self.opening.person[0]], self.caption, self.attribute)]
        kept = locate(self.kept)
        if 0 < len(kept) < len(person):  # else images were left out, and there is nothing to keep or all
            turns.append(DraftTurn(kept, attribute=self.kept_by))
        asked = [(-1, number) for number in self.opening.attributes]
        captions = self.opening.captions
        return Draft(gallery, 0, locate(self.opening.found), captions=captions, attributes=asked, turns=turns)


def draw_dialogue(pool: ImagePool, rng: random.Random, size: int, matches: int) -> Dialogue | None:
    """Draw a dialogue, or None if what was drawn leaves nothing to ask.

    The second answer should not be had by repeating the first. In 4,000 dialogues of 300 made-up people in three
    outfits it is the same in 17 %; it lacks images that were found in 77 % and has others in 26 %.

    Args:
        pool: images with captions or attributes (``explain_missing``).
        rng: the source of randomness.
        size: how many images are shown; fewer if the source has no more.
        matches: how many of them the first turn finds, at least 1; fewer if the source has no more.
    """
    opens: list[Callable[[ImagePool, random.Random, int, int], Opening]] = []
    opens += [_open_with_captions] if pool.caption_openings.most else []
    opens += [_open_with_attributes] if pool.attribute_openings else []
    opening = opens[int(rng.random() * len(opens))](pool, rng, size, matches)
    if not opening.others:
        return None
    words, attributes = _list_words(pool, opening), _list_telling(pool, opening)
    caption = attribute = None
    if words and (not attributes or rng.random() < 0.5):
        caption = pick(rng, words)
    elif attributes:
        attribute = pick(rng, attributes)
    else:
        return None
    kept_by, kept = _draw_kept(pool, rng, opening) if rng.random() < 0.5 else (None, frozenset[int]())
    images = _order_images(pool, rng, opening, attribute)
    return Dialogue(opening, caption, attribute, kept_by, kept, images)


def _open_with_attributes(pool: ImagePool, rng: random.Random, size: int, matches: int) -> Opening:
    confirmed = pick(rng, pool.attribute_openings)
    # Only images whose attributes are known, as in retrieval by attributes.
    same = [i for i in pool.people.list_alike(confirmed) if i != confirmed and pool.list_attributes(i)]
    rng.shuffle(same)
    # Of those that are found, from all but one to none are other people's.
    own = rng.randint(1, matches)
    asked = draw_asked(pool, rng, confirmed)
    while True:
        has_all = make_check(pool, asked)
        found = [confirmed, *[image for image in same if has_all(image)][: own - 1]]
        others = _draw_others(pool, rng, asked, confirmed, matches - len(found))
        if others or len(found) == matches or len(asked) == 1:
            break
        # Nobody else has all of these; with fewer, there is something left to find out.
        asked.remove(pick(rng, asked))
    missed = [image for image in same if not has_all(image)]
    room = size - len(found) - max(1, len(others))
    person = found + missed[: rng.randint(0, max(0, min(len(missed), room)))]
    more = draw_among(
        rng,
        pool.attributed,
        lambda image: pool.is_other_person(image, confirmed) and not has_all(image),
        size - len(person) - len(others),
    )
    return Opening([], asked, person, others + more, frozenset(found + others))


def _draw_others(pool: ImagePool, rng: random.Random, asked: Sequence[int], confirmed: int, count: int) -> list[int]:
    """Return up to ``count`` images of other people with all attributes that are asked for."""
    has_all = make_check(pool, asked)
    return draw_among(
        rng,
        find_rarest(pool, asked),
        lambda image: pool.is_other_person(image, confirmed) and has_all(image),
        count,
        look_at_all=False,
    )


def _open_with_captions(pool: ImagePool, rng: random.Random, size: int, matches: int) -> Opening:
    own = rng.randint(1, matches)
    confirmed = pool.caption_openings.draw(rng, own)
    same = [image for image in pool.people.list_alike(confirmed) if image != confirmed]
    person = [confirmed, *rng.sample(same, min(own - 1, len(same)))]
    captions = [pick(rng, pool.list_captions(confirmed))]

    def is_unlike_all(image: int) -> bool:
        return all(pool.is_unlike(shown, image) for shown in person)

    others: list[int] = []
    described = [confirmed]
    if matches > len(person):
        # Another person, who may be the one that is meant, too.
        described += draw_among(rng, pool.captioned, is_unlike_all, 1)
    if len(described) == 2:
        captions.append(pick(rng, pool.list_captions(described[1])))
        rng.shuffle(captions)
        alike = [image for image in pool.people.list_alike(described[1]) if image != described[1]]
        rng.shuffle(alike)
        others = [described[1], *filter(is_unlike_all, alike)][: matches - len(person)]
    more = draw_among(
        rng,
        pool.everything,
        lambda image: all(pool.is_unlike(shown, image) for shown in described),
        size - len(person) - len(others),
    )
    return Opening(captions, [], person, others + more, frozenset(person + others))


def _list_words(pool: ImagePool, opening: Opening) -> list[int]:
    """Return captions of the person that were not said, and are neither the confirmed image's own nor another's."""
    said = {pool.caption_codes[number] for number in opening.captions}
    said = said.union(*(pool.get_caption_codes(image) for image in opening.others))
    return [n for n in pool.list_other_words(opening.person[0]) if pool.caption_codes[n] not in said]


def _list_telling(pool: ImagePool, opening: Opening) -> list[int]:
    """Return attributes that tell the person, in all images, from some whom the first words fit; none asked for."""
    shown = [pool.get_attribute_codes(image) for image in opening.person]
    confused = [image for image in opening.others if image in opening.found] or opening.others
    everyone = frozenset[int].intersection(*(pool.get_attribute_codes(image) for image in confused))
    asked = {pool.attribute_codes[number] for number in opening.attributes}
    telling = frozenset[int].intersection(*shown) - everyone - asked
    return [n for n in pool.list_attributes(opening.person[0]) if pool.attribute_codes[n] in telling]


def _draw_kept(pool: ImagePool, rng: random.Random, opening: Opening) -> tuple[int | None, frozenset[int]]:
    """Return an attribute that some of the person's images have and some have not, and those that have it."""
    looks = {image: pool.get_attribute_codes(image) for image in opening.person}
    if not all(looks.values()):
        return None, frozenset()
    asked = {pool.attribute_codes[number] for number in opening.attributes}
    parting = frozenset[int].union(*looks.values()) - frozenset[int].intersection(*looks.values()) - asked
    numbers = {pool.attribute_codes[n]: n for image in opening.person for n in pool.list_attributes(image)}
    options = [n for code, n in numbers.items() if code in parting]
    if not options:
        return None, frozenset()
    number = pick(rng, options)
    return number, frozenset(image for image in looks if pool.attribute_codes[number] in looks[image])


def _order_images(pool: ImagePool, rng: random.Random, opening: Opening, attribute: int | None) -> list[int]:
    """Return the confirmed image, another person's whom the detail excludes, whoever has an answer, and the others."""
    code = None if attribute is None else pool.attribute_codes[attribute]
    excluded = next(image for image in opening.others if code not in pool.get_attribute_codes(image))
    right = [*opening.person[1:], *(image for image in opening.others if image in opening.found)]
    rng.shuffle(right)
    first = [opening.person[0], excluded]
    return [*dict.fromkeys([*first, *right, *opening.others])]

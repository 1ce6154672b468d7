"""The people of the synthetic world: who they are, how they are built and how a sentence describes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


VOCABULARY: dict[str, tuple[str, ...]] = {
    "gender": ("male", "female"),
    "age": ("young", "middle-aged", "elderly"),
    "hair": (
        "short black hair",
        "short brown hair",
        "short grey hair",
        "long black hair",
        "long brown hair",
        "long blond hair",
        "a bald head",
    ),
    "upper_type": ("t-shirt", "shirt", "sweater", "hoodie", "jacket", "coat"),
    "upper_colour": (
        "black",
        "white",
        "grey",
        "red",
        "orange",
        "yellow",
        "green",
        "blue",
        "purple",
        "pink",
        "brown",
    ),
    "upper_pattern": ("plain", "striped", "checked", "logo"),
    "lower_type": ("trousers", "jeans", "shorts", "skirt"),
    "lower_colour": ("black", "white", "grey", "blue", "brown", "green", "red", "beige"),
    "shoes": ("black shoes", "white sneakers", "brown boots", "red sneakers"),
    "bag": ("no bag", "black backpack", "red backpack", "brown handbag", "blue shoulder bag"),
    "hat": ("no hat", "black cap", "red cap", "white hat"),
}
CAPTION_VARIANTS = 4

# What tells two people apart in an image; gender, age and shoes are too hard to see to count.
SIGNATURE = ("upper_type", "upper_colour", "upper_pattern", "lower_type", "lower_colour", "bag", "hat", "hair")

_RANDOM_STREAM = 1


@dataclass(frozen=True, slots=True)
class Person:
    """One inhabitant of the synthetic world.

    Attributes:
        person_number: identity, counted from 1.
        attributes: one value of ``VOCABULARY`` for each of its keys.
        height_scale: body height against the tallest person.
        shoulder_width: factor on the body's width.
        leg_ratio: leg length over body height.
        skin_tone: 0 (light) to 1 (dark).
        head_size: head height over body height.
        hair_jitter: -1 (darker) to 1 (lighter) than the named hair colour.
        cloth_jitter: -1 (darker) to 1 (lighter) than the named clothes colours.
    """

    person_number: int
    attributes: dict[str, str]
    height_scale: float
    shoulder_width: float
    leg_ratio: float
    skin_tone: float
    head_size: float
    hair_jitter: float
    cloth_jitter: float


def sample_people(count: int, seed: int, first_number: int = 1) -> list[Person]:
    """Return the people ``first_number`` to ``first_number + count - 1`` of the world of this seed.

    Two people never share their whole ``SIGNATURE``: the later one is drawn again. The people before
    ``first_number`` are drawn too, so that a person is the same whichever slice of the world is asked for.

    Raises:
        ValueError: ``count`` is negative or ``first_number`` is below 1.
    """
    if count < 0 or first_number < 1:
        raise ValueError(f"count must be 0 or more and first_number 1 or more, got {count} and {first_number}.")
    taken: set[tuple[str, ...]] = set()
    people: list[Person] = []
    for person_number in range(1, first_number + count):
        attempt = 0
        person = _draw_person(seed, person_number, attempt)
        while _get_signature(person) in taken:
            attempt += 1
            person = _draw_person(seed, person_number, attempt)
        taken.add(_get_signature(person))
        people.append(person)
    return people[first_number - 1 :]


def describe_person(person: Person, variant: int, posture: str) -> str:
    """Return a short description of the person in wording ``variant`` (taken modulo ``CAPTION_VARIANTS``).

    Every attribute is named; wording 0 and 2 leave out a missing bag or hat, 1 and 3 say that it is missing.
    """
    values = person.attributes
    noun = f"{values['age']} {'man' if values['gender'] == 'male' else 'woman'}"
    pronoun = "he" if values["gender"] == "male" else "she"
    clothes = [_describe_upper(values), _describe_lower(values), values["shoes"]]
    hat = "" if values["hat"] == "no hat" else _add_article(values["hat"])
    bag = "" if values["bag"] == "no bag" else _add_article(values["bag"])
    wording = variant % CAPTION_VARIANTS
    if wording == 0:
        worn = _join_words([*clothes, hat] if hat else clothes)
        carrying = f" carrying {bag}," if bag else ""
        return f"{_capitalise(_add_article(noun))} with {values['hair']}, wearing {worn},{carrying} is {posture}."
    if wording == 1:
        return (
            f"This is {_add_article(noun)} with {values['hair']} and {hat or 'no hat'}, dressed in "
            f"{_join_words(clothes)}. {_capitalise(pronoun)} is {posture} and carries {bag or 'no bag'}."
        )
    if wording == 2:
        head = f"{values['hair']} and {hat}" if hat else values["hair"]
        ending = f" with {bag}" if bag else ""
        return f"Dressed in {_join_words(clothes)}, {_add_article(noun)} with {head} is {posture}{ending}."
    return (
        f"{_capitalise(_add_article(noun))} is {posture}; {pronoun} has {values['hair']} and {hat or 'no hat'}, "
        f"wears {_join_words(clothes)}, and carries {bag or 'no bag'}."
    )


def _draw_person(seed: int, person_number: int, attempt: int) -> Person:
    rng = np.random.default_rng((_RANDOM_STREAM, seed, person_number, attempt))
    values = {name: _pick(rng, choices) for name, choices in VOCABULARY.items()}
    values["hair"] = _pick(rng, _list_hair(values["gender"], values["age"]))
    if values["gender"] == "male":
        values["lower_type"] = _pick(rng, [name for name in VOCABULARY["lower_type"] if name != "skirt"])
    broad = 1.06 if values["gender"] == "male" else 0.94
    return Person(
        person_number=person_number,
        attributes=values,
        height_scale=float(rng.uniform(0.88, 1.0)),
        shoulder_width=float(rng.uniform(0.88, 1.14)) * broad,
        leg_ratio=float(rng.uniform(0.45, 0.5)),
        skin_tone=float(rng.uniform(0.0, 1.0)),
        head_size=float(rng.uniform(0.135, 0.16)),
        hair_jitter=float(rng.uniform(-1.0, 1.0)),
        cloth_jitter=float(rng.uniform(-1.0, 1.0)),
    )


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _list_hair(gender: str, age: str) -> list[str]:
    """Return the hair that fits: it is the visible sign of gender and age in a toy figure."""
    hair = [name for name in VOCABULARY["hair"] if gender == "female" or not name.startswith("long")]
    if gender == "female":
        hair.remove("a bald head")
    if age == "young":
        hair.remove("short grey hair")
    if age == "elderly":
        hair = [name for name in hair if "grey" in name or "blond" in name or "bald" in name]
    return hair


def _get_signature(person: Person) -> tuple[str, ...]:
    return tuple(person.attributes[name] for name in SIGNATURE)


def _describe_upper(values: dict[str, str]) -> str:
    garment = f"{values['upper_colour']} {values['upper_type']}"
    pattern = values["upper_pattern"]
    if pattern == "logo":
        return f"{_add_article(garment)} with a logo"
    if pattern == "plain":
        return _add_article(f"plain {garment}")
    return _add_article(f"{values['upper_colour']} {pattern} {values['upper_type']}")


def _describe_lower(values: dict[str, str]) -> str:
    garment = f"{values['lower_colour']} {values['lower_type']}"
    return _add_article(garment) if values["lower_type"] == "skirt" else garment


def _add_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _join_words(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"


def _capitalise(words: str) -> str:
    return words[0].upper() + words[1:]

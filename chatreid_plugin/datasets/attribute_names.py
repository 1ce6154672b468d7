"""Binary attributes of PA-100K, PETA and RAP become a few names with values, e.g. ``upperBodyPlaid`` -> upper: plaid.

The published names come from the annotation files as Rethinking_of_PAR lists them (dataset/pedes_attr/annotation.md).
Names without a meaning here (occlusion, role, ...) are left out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


Meaning = tuple[str, str]

# Published name -> (attribute, value), where no rule below gives it.
MEANINGS: dict[str, Meaning] = {
    # PA-100K
    "AgeLess18": ("age", "under 18"),
    "Age18-60": ("age", "18 to 60"),
    "AgeOver60": ("age", "over 60"),
    "Front": ("view", "front"),
    "Side": ("view", "side"),
    "Back": ("view", "back"),
    "Hat": ("accessory", "hat"),
    "Glasses": ("accessory", "glasses"),
    "HandBag": ("bag", "hand bag"),
    "ShoulderBag": ("bag", "shoulder bag"),
    "Backpack": ("bag", "backpack"),
    "HoldObjectsInFront": ("action", "holding objects in front"),
    "ShortSleeve": ("sleeves", "short"),
    "LongSleeve": ("sleeves", "long"),
    "UpperStride": ("upper", "striped"),
    "UpperLogo": ("upper", "logo"),
    "UpperPlaid": ("upper", "plaid"),
    "UpperSplice": ("upper", "spliced"),
    "LowerStripe": ("lower", "striped"),
    "LowerPattern": ("lower", "patterned"),
    "LongCoat": ("upper", "long coat"),
    "Trousers": ("lower", "trousers"),
    "Shorts": ("lower", "shorts"),
    "Skirt&Dress": ("lower", "skirt or dress"),
    "boots": ("shoes", "boots"),
    # PETA: the age is the upper bound of a range
    "personalLess15": ("age", "up to 15"),
    "personalLess30": ("age", "16 to 30"),
    "personalLess45": ("age", "31 to 45"),
    "personalLess60": ("age", "46 to 60"),
    "personalLarger60": ("age", "over 60"),
    "personalMale": ("gender", "male"),
    "personalFemale": ("gender", "female"),
    "carryingShoppingTro": ("bag", "shopping trolley"),
    "upperBodyShortSleeve": ("sleeves", "short"),
    "upperBodyLongSleeve": ("sleeves", "long"),
    "upperBodyNoSleeve": ("sleeves", "none"),
    # RAP, with the spelling of its files; PA-100K has Female too
    "Female": ("gender", "female"),
    "Femal": ("gender", "female"),
    "AgeLess16": ("age", "up to 16"),
    "Age17-30": ("age", "17 to 30"),
    "Age31-45": ("age", "31 to 45"),
    "Age46-60": ("age", "46 to 60"),
    "BodyFat": ("build", "heavy"),
    "BodyNormal": ("build", "average"),
    "BodyThin": ("build", "slim"),
    "hs-BaldHead": ("hair", "bald"),
    "hs-LongHair": ("hair", "long"),
    "hs-BlackHair": ("hair_colour", "black"),
    "hs-Hat": ("accessory", "hat"),
    "hs-Glasses": ("accessory", "glasses"),
    "hs-Muffler": ("accessory", "muffler"),
    "ub-ShortSleeve": ("sleeves", "short"),
    "faceFront": ("view", "front"),
    "faceBack": ("view", "back"),
    "faceLeft": ("view", "left side"),
    "faceRight": ("view", "right side"),
    "action-Pusing": ("action", "pushing"),
    "action-CarrybyArm": ("action", "carrying by arm"),
    "action-CarrybyHand": ("action", "carrying by hand"),
}
# What a missing attribute says: these are the only ones of which a set has one side of two.
OPPOSITES: dict[str, Meaning] = {"Female": ("gender", "male"), "Femal": ("gender", "male")}
# First part of a published name -> attribute; the rest of the name is the value, or a colour.
PREFIXES = {
    "accessory": "accessory",
    "hair": "hair",
    "upperBody": "upper",
    "lowerBody": "lower",
    "footwear": "shoes",
    "carrying": "bag",
    "ub-": "upper",
    "up-": "upper",
    "lb-": "lower",
    "low-": "lower",
    "shoes-": "shoes",
    "attach-": "bag",
    "attachment-": "bag",
    "action-": "action",
}
COLOURS = {
    name: name
    for name in ("black", "blue", "brown", "green", "orange", "pink", "purple", "red", "silver", "white", "yellow")
} | {"grey": "grey", "gray": "grey", "mixture": "mixed"}


@cache
def find_meaning(published: str) -> Meaning | None:
    """Return (attribute, value) of a published binary attribute; None if it is left out."""
    if published in MEANINGS:
        return MEANINGS[published]
    for prefix, name in PREFIXES.items():
        rest = published.removeprefix(prefix)
        if rest in ("", published):
            continue
        colour = COLOURS.get(rest.removeprefix("Color").lower())
        if colour:
            return f"{name}_colour", colour
        return name, _split_words(rest)
    return None


def _split_words(text: str) -> str:
    """``ThinStripes`` -> thin stripes, ``TShirt`` -> t shirt."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text).lower()


@dataclass(frozen=True, slots=True)
class AttributeColumns:
    """The columns of a label matrix.

    Attributes:
        names: the published names, in column order.
    """

    names: tuple[str, ...]

    def describe(self, row: Sequence[float]) -> dict[str, str]:
        """Return attribute -> value of one image.

        Values that share an attribute are joined: ``bag: backpack and hand bag``.

        Args:
            row: one number for each column; 1 means present, 0 absent, anything else unknown (RAP).
        """
        found: dict[str, list[str]] = {}
        for published, value in zip(self.names, row, strict=True):
            meaning = find_meaning(published) if value == 1 else OPPOSITES.get(published) if value == 0 else None
            if meaning is not None and meaning[1] not in found.setdefault(meaning[0], []):
                found[meaning[0]].append(meaning[1])
        return {name: " and ".join(values) for name, values in found.items()}

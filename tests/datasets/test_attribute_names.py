"""Tests of chatreid_plugin.datasets.attribute_names: what the published binary attributes say in words."""

import pytest

from chatreid_plugin.datasets.attribute_names import AttributeColumns, find_meaning


# Of PA-100K, PETA and RAP, each rule once (annotation.md of Rethinking_of_PAR).
MEANINGS = {
    "Skirt&Dress": ("lower", "skirt or dress"),
    "UpperStride": ("upper", "striped"),
    "AgeLess18": ("age", "under 18"),
    "personalLess45": ("age", "31 to 45"),
    "upperBodyThickStripes": ("upper", "thick stripes"),
    "upperBodyShortSleeve": ("sleeves", "short"),
    "lowerBodyShortSkirt": ("lower", "short skirt"),
    "lowerBodyGrey": ("lower_colour", "grey"),
    "footwearLeatherShoes": ("shoes", "leather shoes"),
    "hairBald": ("hair", "bald"),
    "hairBlack": ("hair_colour", "black"),
    "carryingNothing": ("bag", "nothing"),
    "accessorySunglasses": ("accessory", "sunglasses"),
    "ub-TShirt": ("upper", "t shirt"),
    "ub-SuitUp": ("upper", "suit up"),
    "up-Gray": ("upper_colour", "grey"),
    "up-ColorRed": ("upper_colour", "red"),
    "ub-ColorMixture": ("upper_colour", "mixed"),
    "low-Blue": ("lower_colour", "blue"),
    "shoes-Sport": ("shoes", "sport"),
    "shoes-Brown": ("shoes_colour", "brown"),
    "attach-SingleShoulderBag": ("bag", "single shoulder bag"),
    "attachment-HandTrunk": ("bag", "hand trunk"),
    "action-CarryingByArm": ("action", "carrying by arm"),
    "hs-BaldHead": ("hair", "bald"),
    "BodyThin": ("build", "slim"),
}


@pytest.mark.parametrize(("published", "expected"), MEANINGS.items())
def test_published_attribute_becomes_a_name_and_a_value(published: str, expected: tuple[str, str]) -> None:
    assert find_meaning(published) == expected


@pytest.mark.parametrize("published", ["Customer", "occlusionLeft", "occlusion-Person", "ub-", "anything"])
def test_attribute_without_a_meaning_is_left_out(published: str) -> None:
    assert find_meaning(published) is None
    assert AttributeColumns((published,)).describe([1]) == {}


def test_absent_and_unknown_attributes_are_left_out_but_for_the_gender() -> None:
    columns = AttributeColumns(("Female", "Hat", "UpperLogo"))
    assert columns.describe([0, 0, 1]) == {"gender": "male", "upper": "logo"}
    assert columns.describe([1, 1, 0]) == {"gender": "female", "accessory": "hat"}
    assert columns.describe([2, 2, 2]) == {}


def test_values_of_one_attribute_are_joined_once() -> None:
    columns = AttributeColumns(("HandBag", "Backpack", "attachment-Backpack", "personalMale"))
    assert columns.describe([1, 1, 1, 0]) == {"bag": "hand bag and backpack"}

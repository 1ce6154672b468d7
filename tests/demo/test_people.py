"""Tests of the people of the synthetic world."""

import re

import pytest

from chatreid_plugin.demo.people import CAPTION_VARIANTS, SIGNATURE, VOCABULARY, Person, describe_person, sample_people


PEOPLE = sample_people(400, seed=3)


def make_person(**attributes: str) -> Person:
    values = {
        "gender": "female",
        "age": "young",
        "hair": "long brown hair",
        "upper_type": "t-shirt",
        "upper_colour": "red",
        "upper_pattern": "striped",
        "lower_type": "jeans",
        "lower_colour": "blue",
        "shoes": "white sneakers",
        "bag": "black backpack",
        "hat": "no hat",
    }
    return Person(1, values | attributes, 1.0, 1.0, 0.5, 0.5, 0.15, 0.0, 0.0)


def test_same_seed_gives_same_people() -> None:
    assert sample_people(400, seed=3) == PEOPLE


def test_other_seed_gives_other_people() -> None:
    assert sample_people(20, seed=4) != PEOPLE[:20]


def test_growing_the_world_keeps_earlier_people() -> None:
    assert sample_people(60, seed=3) == PEOPLE[:60]


def test_slice_of_the_world_equals_the_same_people() -> None:
    assert sample_people(50, seed=3, first_number=101) == PEOPLE[100:150]


def test_people_are_numbered_from_first_number() -> None:
    assert [person.person_number for person in sample_people(3, seed=0, first_number=7)] == [7, 8, 9]


def test_empty_world_has_nobody() -> None:
    assert sample_people(0, seed=0) == []


@pytest.mark.parametrize(("count", "first_number"), [(-1, 1), (1, 0)])
def test_impossible_numbers_are_refused(count: int, first_number: int) -> None:
    with pytest.raises(ValueError, match="first_number 1 or more"):
        sample_people(count, seed=0, first_number=first_number)


def test_nobody_shares_the_whole_signature() -> None:
    assert len({tuple(person.attributes[name] for name in SIGNATURE) for person in PEOPLE}) == len(PEOPLE)


def test_collision_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # With the colour as the whole signature, eleven people take all eleven colours only by drawing again.
    monkeypatch.setattr("chatreid_plugin.demo.people.SIGNATURE", ("upper_colour",))
    people = sample_people(11, seed=0)
    assert {person.attributes["upper_colour"] for person in people} == set(VOCABULARY["upper_colour"])
    assert sample_people(5, seed=0) == people[:5]


def test_attributes_stay_in_the_vocabulary() -> None:
    for person in PEOPLE:
        assert list(person.attributes) == list(VOCABULARY)
        assert all(value in VOCABULARY[name] for name, value in person.attributes.items())


def test_every_word_of_the_vocabulary_occurs() -> None:
    for name, values in VOCABULARY.items():
        assert {person.attributes[name] for person in PEOPLE} == set(values)


def test_men_wear_no_skirts() -> None:
    assert all(p.attributes["gender"] == "female" for p in PEOPLE if p.attributes["lower_type"] == "skirt")


def test_body_numbers_stay_in_range() -> None:
    for person in PEOPLE:
        assert 0.85 <= person.height_scale <= 1.0
        assert 0.8 <= person.shoulder_width <= 1.25
        assert 0.4 <= person.leg_ratio <= 0.55
        assert 0.0 <= person.skin_tone <= 1.0
        assert 0.12 <= person.head_size <= 0.17
        assert abs(person.hair_jitter) <= 1.0
        assert abs(person.cloth_jitter) <= 1.0


def test_first_wording_reads_as_designed() -> None:
    assert describe_person(make_person(), 0, "walking") == (
        "A young woman with long brown hair, wearing a red striped t-shirt, blue jeans and white sneakers, "
        "carrying a black backpack, is walking."
    )


@pytest.mark.parametrize("variant", range(CAPTION_VARIANTS))
@pytest.mark.parametrize("posture", ["walking", "standing"])
def test_every_wording_names_every_attribute(variant: int, posture: str) -> None:
    for person in PEOPLE[:100]:
        caption = describe_person(person, variant, posture).lower()
        values = person.attributes
        assert re.search(r"\bman\b" if values["gender"] == "male" else r"\bwoman\b", caption)
        for name in (
            "age",
            "hair",
            "upper_type",
            "upper_colour",
            "upper_pattern",
            "lower_type",
            "lower_colour",
            "shoes",
        ):
            assert re.search(rf"\b{values[name]}\b", caption), (name, caption)
        for name in ("bag", "hat"):
            assert values[name].startswith("no ") or values[name] in caption, (name, caption)
        assert posture in caption


@pytest.mark.parametrize("variant", range(CAPTION_VARIANTS))
def test_captions_are_short_and_grammatical(variant: int) -> None:
    for person in PEOPLE[:200]:
        caption = describe_person(person, variant, "standing")
        assert len(caption.split()) < 45
        assert caption[0].isupper()
        assert caption.endswith(".")
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|  |,,| ,", caption), caption
        assert not re.search(r"\ban? (?:plain )?\w+ (?:trousers|jeans|shorts)\b", caption), caption


def test_article_follows_the_sound() -> None:
    caption = describe_person(make_person(age="elderly", upper_colour="orange"), 0, "walking")
    assert caption.startswith("An elderly woman")
    assert "an orange striped t-shirt" in caption


def test_skirt_takes_an_article() -> None:
    assert "a red skirt" in describe_person(make_person(lower_type="skirt", lower_colour="red"), 2, "walking")


@pytest.mark.parametrize(
    ("pattern", "phrase"),
    [("plain", "a plain red t-shirt"), ("checked", "a red checked t-shirt"), ("logo", "a red t-shirt with a logo")],
)
def test_pattern_reads_well(pattern: str, phrase: str) -> None:
    assert phrase in describe_person(make_person(upper_pattern=pattern), 1, "walking")


def test_missing_things_are_said_or_left_out() -> None:
    person = make_person(bag="no bag", hat="no hat")
    for variant, is_said in ((0, False), (1, True), (2, False), (3, True)):
        caption = describe_person(person, variant, "walking")
        assert ("no bag" in caption) is is_said
        assert ("no hat" in caption) is is_said


def test_wordings_differ_and_repeat() -> None:
    captions = [describe_person(make_person(), variant, "walking") for variant in range(CAPTION_VARIANTS + 1)]
    assert len(set(captions[:-1])) == CAPTION_VARIANTS
    assert captions[-1] == captions[0]

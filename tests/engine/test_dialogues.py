"""Tests of chatreid_plugin.engine.dialogues: who is found, confirmed and kept; what is said, and never said twice."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.builders import TEXT_TOKENS, TURN_TOKENS, build_draft, explain_missing
from chatreid_plugin.engine.executors import PlacedDraft, assemble_records
from chatreid_plugin.engine.pool import Draft
from chatreid_plugin.engine.sampler import ImagePool
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import ImageRecord, Instruction, convert_row_to_instruction


MakeImages = Callable[..., list[ImageRecord]]
IndexImages = Callable[..., ImagePool]
NAME = "dialogue_retrieval"


@pytest.fixture
def outfits(make_images: MakeImages, index_images: IndexImages) -> ImagePool:
    """Return people who wear three outfits, each described in words of its own; bags and shoes are of three kinds."""
    records: list[ImageRecord] = []
    for record in make_images(people=12, cameras=3, images=3, outfits=3, views=True, size=(192, 384)):
        person, _, outfit = (int(number) for number in record.path.removesuffix(".jpg").split("_"))
        looks = {"upper_colour": f"colour {(person + outfit) % 4}", "bag": f"bag {person % 3}"}
        records.append(replace(record, attributes=looks | {"shoes": f"shoes {person // 4}"}))
    return index_images(records)


def make_settings(**changes: Any) -> BuildSettings:
    return BuildSettings.model_validate(
        {"sources": [{"name": "own", "root": "raw"}], "records": {"stage3": 1}} | changes
    )


def draw(pool: ImagePool, count: int = 400, **changes: Any) -> list[Draft]:
    settings, rng = make_settings(**changes), random.Random(1)
    assert explain_missing(NAME, pool) is None
    return [build_draft(NAME, pool, rng, settings, "r") for _ in range(count)]


def convert(pool: ImagePool, drafts: list[Draft]) -> list[Instruction]:
    placed = [PlacedDraft(draft, pool.first, 0) for draft in drafts]
    table = assemble_records(pool.table, placed, NAME, [f"r-{number}" for number in range(len(drafts))])
    return [convert_row_to_instruction(row) for row in table.to_pylist()]


def test_every_kind_of_dialogue_is_drawn(outfits: ImagePool) -> None:
    drafts = draw(outfits)
    kinds = Counter(
        (len(draft.captions), draft.turns[0].caption is not None, len(draft.turns) == 2) for draft in drafts
    )
    # Attributes, one caption or two; then a caption or an attribute; two turns or three.
    assert {kind[:2] for kind in kinds} == {(said, words) for said in (0, 1, 2) for words in (False, True)}
    assert {kind[2] for kind in kinds} == {False, True}
    starts = Counter(bool(draft.captions) for draft in drafts)
    assert 0.4 < starts[True] / len(drafts) < 0.6
    assert {len(draft.images) for draft in drafts} == set(range(2, 11))


def test_second_answer_is_mostly_not_the_first_again(outfits: ImagePool) -> None:
    shares: dict[bool, list[bool]] = {True: [], False: []}
    gained = lost = 0
    for draft in draw(outfits, 1000):
        first, second = set(draft.matches), set(draft.turns[0].matches)
        shares[bool(draft.captions)].append(first == second)
        gained += bool(second - first)
        lost += bool(first - second)
        assert all(set(turn.matches) < second for turn in draft.turns[1:])
    # One described person is found at once; two are told apart by the image that is confirmed.
    assert sum(shares[True]) / len(shares[True]) < 0.4
    assert sum(shares[False]) / len(shares[False]) < 0.3
    # Neither "some of the first" nor "the first and more" is always right.
    assert lost > 300 and gained > 100


def test_confirmed_letter_and_number_of_answers_vary(outfits: ImagePool) -> None:
    drafts = draw(outfits, 1000, gallery={"min_size": 6, "max_size": 6})
    assert {draft.turns[0].confirmed for draft in drafts} == set(range(6))
    assert {len(draft.turns[0].matches) for draft in drafts} == set(range(1, 6))
    assert {len(draft.matches) for draft in drafts} == set(range(1, 7))


def test_nothing_is_said_twice(outfits: ImagePool) -> None:
    for record in convert(outfits, draw(outfits)):
        said = [*record.captions, *(f"{a.name}: {a.value}" for a in record.attributes)]
        said += [turn.caption or f"{turn.name}: {turn.value}" for turn in record.turns]
        assert len(set(said)) == len(said)


def test_attribute_that_is_added_excludes_somebody_who_was_found(outfits: ImagePool) -> None:
    for draft in draw(outfits):
        person = set(draft.turns[0].matches)
        others = set(range(len(draft.images))) - person
        confused = (set(draft.matches) - person) or others
        if draft.turns[0].attribute is not None:
            code = outfits.attribute_codes[draft.turns[0].attribute]
            assert not all(code in outfits.get_attribute_codes(draft.images[place]) for place in confused)


def test_source_with_captions_alone_gives_two_turns(make_images: MakeImages, index_images: IndexImages) -> None:
    pool = index_images(make_images(people=6, cameras=2, images=2, views=True, attributes={}))
    for draft in draw(pool, 100):
        assert draft.captions and not draft.attributes
        (turn,) = draft.turns
        assert turn.caption is not None and turn.caption not in draft.captions


def test_source_with_attributes_alone_is_asked_for_them(make_images: MakeImages, index_images: IndexImages) -> None:
    for draft in draw(index_images(make_images(people=9, captions=())), 100):
        assert draft.attributes and not draft.captions
        assert draft.turns[0].caption is None


def test_images_without_attributes_are_never_asked_about_them(outfits: ImagePool, index_images: IndexImages) -> None:
    rows = outfits.table.table.to_pylist()
    records = [
        ImageRecord(
            f"own/{row['path']}",
            *("own", "train", row["path"], row["person_id"], row["camera_id"]),
            *(row["width"], row["height"], row["clothes_id"]),
            captions=tuple(row["captions"]),
            attributes={item["name"]: item["value"] for item in row["attributes"]} if number % 3 else {},
        )
        for number, row in enumerate(rows)
    ]
    pool = index_images(records)
    for draft in draw(pool):
        person = [draft.images[place] for place in draft.turns[0].matches]
        if draft.attributes:
            assert all(pool.list_attributes(image) for image in draft.images)
        if len(draft.turns) == 2:
            assert all(pool.list_attributes(image) for image in person)


def test_short_galleries_keep_the_confirmed_image_and_one_that_the_detail_excludes(outfits: ImagePool) -> None:
    # Room for three images of 103 tokens, or four in two turns, beside texts that take fewer than 50.
    cutoff = TEXT_TOKENS + 2 * TURN_TOKENS + 50 + 3 * 103
    drafts = draw(outfits, 300, cutoff_len=cutoff)
    assert {len(draft.images) for draft in drafts} == {2, 3, 4}
    for draft in drafts:
        second, *third = draft.turns
        assert second.confirmed in second.matches and second.confirmed in draft.matches
        assert len(second.matches) < len(draft.images)
        assert all(0 < len(turn.matches) < len(second.matches) for turn in third)


def test_dialogue_that_does_not_fit_is_refused(outfits: ImagePool) -> None:
    with pytest.raises(DataError, match=r"do not fit cutoff_len 400\. Raise it"):
        draw(outfits, 1, cutoff_len=400)


def test_people_of_one_look_and_one_word_are_an_error(make_images: MakeImages, index_images: IndexImages) -> None:
    records = make_images(people=4, cameras=2, images=1, attributes={}, captions=("a man", "a person"))
    records = [replace(r, captions=r.captions[: 1 + number % 2]) for number, r in enumerate(records)]
    with pytest.raises(DataError, match="Source own: 100 images drawn, and no other person"):
        draw(index_images(records), 1)

"""Tests of chatreid_plugin.engine.builders: every task's record is true, renders, and fits the sequence."""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from scipy.stats import chisquare

from chatreid_plugin.answers import read_answer, render_answer
from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.builders import BUILDERS, build_draft, explain_missing
from chatreid_plugin.engine.executors import PlacedDraft, assemble_records
from chatreid_plugin.engine.pool import Draft
from chatreid_plugin.engine.sampler import ImagePool
from chatreid_plugin.engine.stats import compute_gallery_shares, compute_match_shares
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import ImageRecord, Instruction, convert_row_to_instruction
from chatreid_plugin.tasks import LETTER_KINDS, TASKS, render_prompt


MakePool = Callable[..., ImagePool]
MakeImages = Callable[..., list[ImageRecord]]
IndexImages = Callable[..., ImagePool]
NUMBER = 150


def make_settings(**changes: Any) -> BuildSettings:
    source = {"name": "own", "parser": "market1501", "root": "raw"}
    return BuildSettings.model_validate({"sources": [source], "records": {"stage1": 1}} | changes)


def draw_one(task: str, pool: ImagePool, seed: int, **changes: Any) -> Draft:
    return build_draft(task, pool, random.Random(seed), make_settings(**changes), "record-0")


def draw(task: str, pool: ImagePool, number: int = NUMBER, **changes: Any) -> list[Instruction]:
    settings = make_settings(**changes)
    rng = random.Random(7)
    ids = [f"record-{index}" for index in range(number)]
    placed = [PlacedDraft(build_draft(task, pool, rng, settings, name), pool.first, 0) for name in ids]
    return [convert_row_to_instruction(row) for row in assemble_records(pool.table, placed, task, ids).to_pylist()]


def get_person(record: Instruction, position: int) -> int:
    """Return whom the image at this position shows; the pool's paths begin with it."""
    return int(record.images[position].path.split("_")[0])


def get_camera(record: Instruction, position: int) -> int:
    return int(record.images[position].path.split("_")[1])


@pytest.fixture
def pool(make_pool: MakePool) -> ImagePool:
    """Return images that give nearly every task: two of six cameras see infrared, everyone wears three outfits."""
    return make_pool(cameras=6, outfits=3, infrared=2)


@pytest.fixture
def described_pool(make_pool: MakePool) -> ImagePool:
    """Return images as in ``pool``, each described in words of its own, which gives every task."""
    return make_pool(cameras=6, outfits=3, infrared=2, views=True)


def test_every_task_has_a_builder() -> None:
    assert set(BUILDERS) == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_every_record_renders_and_shows_no_image_twice(task: str, described_pool: ImagePool) -> None:
    assert explain_missing(task, described_pool) is None
    for index, record in enumerate(draw(task, described_pool)):
        assert (record.id, record.task, record.dataset) == (f"record-{index}", task, "own")
        assert len({image.path for image in record.images}) == len(record.images)
        assert all((image.width, image.height) == (64, 128) for image in record.images)
        assert render_prompt(record).count("<image>") == len(record.images)
        answer = read_answer(task, render_answer(record), max(record.gallery_size, len(record.captions)))
        if TASKS[task].answer_kind in ("match", *LETTER_KINDS, "ordinal"):
            assert answer == record.answer


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_gives_the_same_records(task: str, described_pool: ImagePool) -> None:
    assert draw(task, described_pool, 20) == draw(task, described_pool, 20)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.answer_kind == "match"])
def test_half_of_the_answers_are_yes(task: str, described_pool: ImagePool) -> None:
    answers = [draft.match for draft in (draw_one(task, described_pool, seed) for seed in range(3000))]
    assert answers.count(None) == 0
    assert chisquare([answers.count(True), answers.count(False)]).pvalue > 0.001


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.answer_kind in LETTER_KINDS])
@pytest.mark.parametrize("law", ["uniform_overall", "inverse"])
def test_gallery_sizes_and_matches_are_those_that_the_recipe_intends(task: str, law: str, make_pool: MakePool) -> None:
    # So many people and images that no gallery is cut to what there is.
    pool = make_pool(people=30, cameras=6, images=6, outfits=3, infrared=2, views=True)
    settings = make_settings(gallery={"min_size": 2, "max_size": 4, "matches": law})
    rng = random.Random(11)
    drafts = [build_draft(task, pool, rng, settings, "record-0") for _ in range(600)]
    sizes = Counter(len(draft.images) - draft.query_images for draft in drafts)
    compared = [(sizes, compute_gallery_shares(TASKS[task], settings.gallery))]
    # A dialogue that asks for what one person alone has finds nobody else's images: n is smaller then.
    if task != "dialogue_retrieval":
        numbers = Counter(len(draft.matches) for draft in drafts)
        compared.append((numbers, compute_match_shares(TASKS[task], settings.gallery) or {1: 1.0}))
    for counts, shares in compared:
        assert set(counts) <= set(shares)
        expected = [len(drafts) * share for share in shares.values()]
        assert len(shares) == 1 or chisquare([counts[value] for value in shares], expected).pvalue > 0.001


def test_pair_is_of_one_person_in_two_cameras_or_of_two_people(pool: ImagePool) -> None:
    for record in draw("image_to_image_one_to_one", pool):
        assert (record.query_images, len(record.images)) == (2, 2)
        assert (get_person(record, 0) == get_person(record, 1)) == record.answer.match
        assert not record.answer.match or get_camera(record, 0) != get_camera(record, 1)


@pytest.mark.parametrize("task", ["image_to_image_one_to_one", "image_to_image_many_to_many"])
def test_matches_differ_in_what_the_source_shares_out(task: str, pool: ImagePool) -> None:
    records = draw(task, pool.with_changes({"camera": 1, "clothes": 1, "modality": 2}), 900)
    counts: Counter[str] = Counter()
    for record in records:
        if record.answer.match is False:
            continue
        others = record.answer.indices or (0,)
        shown = [record.images[0], *(record.images[1 + index] for index in others)]
        parts = [image.path.removesuffix(".jpg").split("_") for image in shown]
        infrared = [int(camera) >= 4 for _, camera, _ in parts]
        clothes = {number for _, _, number in parts[1:]}  # an image's number in its camera is its outfit
        if infrared[0] != infrared[1]:
            counts["modality"] += 1
        else:
            counts["camera" if parts[0][2] in clothes else "clothes or camera"] += 1
    # A match in any camera wears other clothes in two of three cases.
    assert counts["modality"] / counts.total() == pytest.approx(0.5, abs=0.08)
    assert counts["camera"] > 0 and counts["clothes or camera"] > counts["camera"]


@pytest.mark.parametrize(("task", "least"), [("image_to_image_many_to_many", 2), ("standard_reid", 1)])
def test_answer_names_all_images_of_the_querys_person(task: str, least: int, pool: ImagePool) -> None:
    numbers: set[int] = set()
    for record in draw(task, pool, gallery={"min_size": 3, "max_size": 6}):
        assert record.query_images == 1
        assert 3 <= record.gallery_size <= 6
        people = [get_person(record, position) for position in range(1, len(record.images))]
        assert record.answer.indices == tuple(i for i, person in enumerate(people) if person == get_person(record, 0))
        assert all(get_camera(record, 1 + i) != get_camera(record, 0) for i in record.answer.indices)
        numbers.add(len(record.answer.indices))
    assert min(numbers) == least
    assert max(numbers) >= 5


def test_cloth_changing_answer_names_all_images_of_the_querys_person_in_other_clothes(pool: ImagePool) -> None:
    for record in draw("cloth_changing_reid", pool):
        people = [get_person(record, position) for position in range(1, len(record.images))]
        assert record.answer.indices == tuple(i for i, person in enumerate(people) if person == get_person(record, 0))
        for index in record.answer.indices:
            assert get_camera(record, 1 + index) != get_camera(record, 0)
            # The image's number in its camera is its outfit's.
            assert record.images[1 + index].path.split("_")[2] != record.images[0].path.split("_")[2]


def test_gallery_across_modalities_is_all_of_the_other_one(pool: ImagePool) -> None:
    for record in draw("visible_infrared_reid", pool):
        infrared = [get_camera(record, position) >= 4 for position in range(len(record.images))]
        assert set(infrared[1:]) == {not infrared[0]}
        people = [get_person(record, position) for position in range(1, len(record.images))]
        assert record.answer.indices == tuple(i for i, person in enumerate(people) if person == get_person(record, 0))


def test_described_persons_images_are_all_right(pool: ImagePool) -> None:
    numbers: set[int] = set()
    for record in draw("text_to_image_reid", pool):
        shown = [f"person number {get_person(record, position)}" for position in range(len(record.images))]
        assert record.query_images == 0
        assert [i for i, text in enumerate(shown) if text == record.captions[0]] == list(record.answer.indices)
        numbers.add(len(record.answer.indices))
    assert min(numbers) == 1 and max(numbers) >= 5


def test_images_with_all_attributes_asked_for_are_right(pool: ImagePool) -> None:
    asked: set[int] = set()
    for record in draw("attribute_retrieval", pool):
        assert {attribute.image for attribute in record.attributes} == {-1}
        wanted = {(attribute.name, attribute.value) for attribute in record.attributes}
        people = [get_person(record, position) for position in range(len(record.images))]
        looks = [{("upper_colour", f"colour {person % 5}"), ("code", str(person))} for person in people]
        assert record.answer.indices == tuple(i for i, look in enumerate(looks) if wanted <= look)
        asked.add(len(wanted))
    assert asked == {1, 2}


@pytest.mark.parametrize("task", ["multimodal_retrieval", "multimodal_one_to_one"])
def test_words_are_of_the_querys_person_in_other_clothes(task: str, described_pool: ImagePool) -> None:
    for record in draw(task, described_pool):
        person, camera, outfit = re.findall(r"\d+", record.images[0].path)
        said = re.findall(r"\d+", record.captions[0])
        assert said[0] == person and said[2] != outfit
        if task == "multimodal_retrieval":
            people = [get_person(record, position) for position in range(1, len(record.images))]
            assert record.answer.indices == tuple(i for i, shown in enumerate(people) if shown == int(person))
            assert all(get_camera(record, 1 + i) != int(camera) for i in record.answer.indices)
        else:
            assert record.answer.match == (get_person(record, 1) == int(person))


def test_words_come_from_another_camera_where_clothes_are_unknown(make_pool: MakePool) -> None:
    for record in draw("multimodal_retrieval", make_pool(cameras=3, views=True)):
        assert re.findall(r"\d+", record.captions[0])[1] != str(get_camera(record, 0))


def test_pair_asks_for_attributes_that_the_image_has_or_lacks(pool: ImagePool) -> None:
    for record in draw("attribute_one_to_one", pool):
        wanted = {(attribute.name, attribute.value) for attribute in record.attributes}
        person = get_person(record, 0)
        assert record.answer.match == (wanted <= {("upper_colour", f"colour {person % 5}"), ("code", str(person))})


def test_caption_fits_the_image_when_the_answer_is_yes(pool: ImagePool) -> None:
    for record in draw("text_to_image_one_to_one", pool):
        assert (record.captions == (f"person number {get_person(record, 0)}",)) == record.answer.match


def test_one_caption_fits_the_image(pool: ImagePool) -> None:
    records = draw("text_to_image_many_to_one", pool, gallery={"max_size": 26})
    for record in records:
        right = f"person number {get_person(record, 0)}"
        assert [i for i, text in enumerate(record.captions) if text == right] == list(record.answer.indices)
    assert {len(record.captions) for record in records} == set(range(2, 9))
    assert {record.answer.indices[0] for record in records} == set(range(8))


def test_one_image_fits_the_caption(pool: ImagePool) -> None:
    records = draw("text_to_image_one_to_many", pool, 400, gallery={"max_size": 6})
    for record in records:
        assert record.query_images == 0
        shown = [f"person number {get_person(record, position)}" for position in range(len(record.images))]
        assert [i for i, text in enumerate(shown) if text == record.captions[0]] == list(record.answer.indices)
    assert {len(record.images) for record in records} == set(range(2, 7))
    assert {record.answer.indices[0] for record in records} == set(range(6))


def test_comparison_carries_both_peoples_attributes_and_two_thirds_differ(pool: ImagePool) -> None:
    same = 0
    for record in draw("attribute_comparison", pool, 1500):
        people = [get_person(record, 0), get_person(record, 1)]
        codes = [attribute.value for attribute in record.attributes if attribute.name == "code"]
        assert codes == [str(person) for person in people]
        assert [attribute.image for attribute in record.attributes] == [0, 0, 1, 1]
        same += people[0] == people[1]
    assert same / 1500 == pytest.approx(1 / 3, abs=4 * (2 / 9 / 1500) ** 0.5)


def test_comparison_never_shows_an_image_without_attributes(
    make_images: MakeImages, index_images: IndexImages
) -> None:
    records = make_images(people=6, cameras=3, images=1)
    some = [record if number % 3 else replace(record, attributes={}) for number, record in enumerate(records)]
    for record in draw("attribute_comparison", index_images(some)):
        assert {attribute.image for attribute in record.attributes} == {0, 1}


def test_prediction_and_captioning_describe_the_image(pool: ImagePool) -> None:
    for record in draw("attribute_prediction", pool):
        assert f"code: {get_person(record, 0)}" in render_answer(record)
    for record in draw("image_captioning", pool):
        assert render_answer(record) == f"person number {get_person(record, 0)}"


def test_positions_of_the_matches_are_uniform(make_pool: MakePool) -> None:
    # Two cameras and one image in each: every gallery has one match.
    pool = make_pool(cameras=2, images=1)
    gallery = {"min_size": 5, "max_size": 5}
    drafts = [draw_one("standard_reid", pool, seed, gallery=gallery) for seed in range(2000)]
    places = [draft.matches[0] for draft in drafts]
    assert {len(draft.matches) for draft in drafts} == {1}
    assert chisquare([places.count(place) for place in range(5)]).pvalue > 0.001


ALIKE = "no two people who are described differently"
LONELY = "no identity seen by two cameras"
DESCRIBED = ("text_to_image", "attribute_comparison", "attribute_retrieval", "attribute_one_to_one")


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, {}),
        (
            {"captions": ()},
            {
                "image_captioning": "no captions",
                "text_to_image": "no captions",
                "multimodal": "no identity seen by two cameras and described in two ways",
            },
        ),
        ({"attributes": {}}, {"attribute": "no attributes"}),
        (
            {"people": 1},
            dict.fromkeys((*DESCRIBED, "dialogue"), ALIKE)
            | dict.fromkeys(("image_to_image", "standard", "cloth", "visible", "multimodal"), "only one identity"),
        ),
        ({"attributes": {"hat": "cap"}}, dict.fromkeys((*DESCRIBED, "dialogue"), ALIKE)),
        (
            {"captions": (), "attributes": {}},
            {
                "image_captioning": "no captions",
                "text_to_image": "no captions",
                "attribute": "no attributes",
                "multimodal": "no identity seen by two cameras and described in two ways",
                "dialogue": "neither captions nor attributes",
            },
        ),
        (
            {"views": False, "attributes": {}},
            {
                "attribute": "no attributes",
                "multimodal": "no identity seen by two cameras and described in two ways",
                "dialogue": "no identity with two images and more than one caption or attribute",
            },
        ),
        (
            {"cameras": 2, "infrared": 1},
            dict.fromkeys(("image_to_image", "standard"), LONELY)
            | {
                "cloth": "no identity in two outfits and two cameras",
                "multimodal": "no identity seen by two cameras and described in two ways",
            },
        ),
        ({"outfits": 0}, {"cloth": "no identity in two outfits and two cameras"}),
        ({"images": 1}, {"cloth": "no identity in two outfits and two cameras"}),
        ({"infrared": 0}, {"visible": "no identity both visible and infrared"}),
        ({"infrared": 6}, {"visible": "no identity both visible and infrared"}),
    ],
)
def test_what_a_pool_cannot_give_is_explained(
    make_pool: MakePool, changes: dict[str, Any], missing: dict[str, str]
) -> None:
    pool = make_pool(**({"cameras": 6, "outfits": 3, "infrared": 2, "views": True} | changes))
    for task in TASKS:
        reasons = [reason for name, reason in missing.items() if task.startswith(name)]
        assert explain_missing(task, pool) == (reasons[0] if reasons else None)
        if not reasons:
            assert len(draw(task, pool, 20)) == 20


def test_modality_with_one_person_gives_no_queries(make_images: MakeImages, index_images: IndexImages) -> None:
    records = make_images(people=5, cameras=4, images=2, infrared=2)
    pool = index_images([r for r in records if r.modality == "visible" or r.person_id == "own:3"])
    # In infrared nobody else is there to choose from, nor for the one person seen in both.
    for record in draw("image_to_image_one_to_one", pool) + draw("standard_reid", pool):
        assert all(get_camera(record, position) < 2 for position in range(len(record.images)))
    for record in draw("visible_infrared_reid", pool):
        assert get_camera(record, 0) >= 2


def test_people_who_cannot_be_told_apart_by_their_captions_are_an_error(make_pool: MakePool) -> None:
    pool = make_pool(people=3, attributes={}, captions=("a man",))
    with pytest.raises(DataError, match="Source own: 100 images drawn, and no other person"):
        draw("text_to_image_one_to_one", pool, 1)

"""Tests of chatreid_plugin.engine.builders: every task's record is true, renders, and fits the sequence."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.builders import BUILDERS, build_record, explain_missing
from chatreid_plugin.engine.sampler import ImagePool
from chatreid_plugin.errors import DataError
from chatreid_plugin.images import ImagePolicy
from chatreid_plugin.records import Instruction
from chatreid_plugin.tasks import TASKS, read_answer, render_answer, render_prompt


MakePool = Callable[..., ImagePool]
NUMBER = 150


def make_settings(**changes: Any) -> BuildSettings:
    source = {"name": "own", "parser": "market1501", "root": "raw"}
    return BuildSettings.model_validate({"sources": [source], "records": {"stage1": 1}} | changes)


def draw(task: str, pool: ImagePool, number: int = NUMBER, **changes: Any) -> list[Instruction]:
    settings = make_settings(**changes)
    rng = np.random.default_rng(7)
    return [build_record(task, pool, rng, settings, f"record-{index}") for index in range(number)]


def get_person(record: Instruction, position: int) -> int:
    """Return whom the image at this position shows; the pool's paths begin with it."""
    return int(record.images[position].path.split("_")[0])


def get_camera(record: Instruction, position: int) -> int:
    return int(record.images[position].path.split("_")[1])


@pytest.fixture
def pool(make_pool: MakePool) -> ImagePool:
    return make_pool()


def test_every_task_has_a_builder() -> None:
    assert set(BUILDERS) == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_every_record_renders_and_shows_no_image_twice(task: str, pool: ImagePool) -> None:
    assert explain_missing(task, pool) is None
    for index, record in enumerate(draw(task, pool)):
        assert (record.id, record.task, record.dataset) == (f"record-{index}", task, "own")
        assert len({image.path for image in record.images}) == len(record.images)
        assert all((image.width, image.height) == (64, 128) for image in record.images)
        assert render_prompt(record).count("<image>") == len(record.images)
        answer = read_answer(task, render_answer(record), max(record.gallery_size, len(record.captions)))
        if TASKS[task].answer_kind in ("match", "letters", "ordinal"):
            assert answer == record.answer


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_gives_the_same_records(task: str, pool: ImagePool) -> None:
    assert draw(task, pool, 20) == draw(task, pool, 20)


@pytest.mark.parametrize("task", TASKS)
def test_wordings_are_all_used_up_to_the_limit(task: str, pool: ImagePool) -> None:
    assert {record.variant for record in draw(task, pool, prompt_variants=1)} == {0}
    assert {record.variant for record in draw(task, pool, prompt_variants=2)} == {0, 1}
    assert {record.variant for record in draw(task, pool, prompt_variants=9)} == set(range(len(TASKS[task].prompts)))


@pytest.mark.parametrize("task", ["image_to_image_one_to_one", "text_to_image_one_to_one"])
def test_half_of_the_answers_are_yes(task: str, pool: ImagePool) -> None:
    answers = [record.answer.match for record in draw(task, pool, 3000)]
    # Four standard deviations of a fair coin over 3,000 throws.
    assert answers.count(True) / 3000 == pytest.approx(0.5, abs=4 * 0.5 / 3000**0.5)
    assert answers.count(None) == 0


def test_pair_is_of_one_person_in_two_cameras_or_of_two_people(pool: ImagePool) -> None:
    for record in draw("image_to_image_one_to_one", pool):
        assert (record.query_images, len(record.images)) == (2, 2)
        assert (get_person(record, 0) == get_person(record, 1)) == record.answer.match
        assert not record.answer.match or get_camera(record, 0) != get_camera(record, 1)


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


def test_comparison_never_shows_an_image_without_attributes(make_pool: MakePool) -> None:
    records = make_pool(people=6, cameras=3, images=1).records
    some = [record if number % 3 else replace(record, attributes={}) for number, record in enumerate(records)]
    for record in draw("attribute_comparison", ImagePool(some, ImagePolicy(2))):
        assert {attribute.image for attribute in record.attributes} == {0, 1}


def test_prediction_and_captioning_describe_the_image(pool: ImagePool) -> None:
    for record in draw("attribute_prediction", pool):
        assert f"code: {get_person(record, 0)}" in render_answer(record)
    for record in draw("image_captioning", pool):
        assert render_answer(record) == f"person number {get_person(record, 0)}"


@pytest.mark.parametrize("task", TASKS)
def test_records_stay_below_the_cutoff(task: str, make_pool: MakePool) -> None:
    pool = make_pool(size=(192, 384))
    records = draw(task, pool, cutoff_len=700, gallery={"max_size": 10})
    assert max(98 * len(record.images) for record in records) < 700
    if "{gallery}" in TASKS[task].prompts[0]:
        # (700 - 256 - around the images) // 98 images fit, of the 11 that were drawn; the answer is still there.
        assert max(len(record.images) for record in records) in (3, 4)
        assert all(record.answer.indices for record in records)


@pytest.mark.parametrize("task", ["text_to_image_one_to_many", "image_captioning", "text_to_image_many_to_one"])
def test_long_captions_count_as_well(task: str, make_pool: MakePool) -> None:
    caption = "word " * 600
    short = draw(task, make_pool(size=(192, 384)), 1, cutoff_len=1024)
    assert short[0].images
    records = [replace(r, captions=(f"{r.person_id} {caption}",)) for r in make_pool(size=(192, 384)).records]
    with pytest.raises(DataError, match=r"record-0: .* do not fit cutoff_len 1024\. Raise it"):
        draw(task, ImagePool(records, ImagePolicy(2)), 1, cutoff_len=1024)


def test_image_that_does_not_fit_is_an_error_that_says_what_to_raise(make_pool: MakePool) -> None:
    pool = make_pool(size=(192, 384))
    with pytest.raises(DataError, match=r"Record record-0: 103 tokens of 1 image.* cutoff_len 300"):
        draw("attribute_prediction", pool, 1, cutoff_len=300)
    with pytest.raises(DataError, match="Raise cutoff_len"):
        draw("standard_reid", pool, 1, cutoff_len=300)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"captions": ()}, {"image_captioning": "no captions", "text_to_image": "no captions"}),
        ({"attributes": {}}, {"attribute": "no attributes"}),
        (
            {"people": 1},
            {
                "text_to_image": "no two people who are described differently",
                "attribute_comparison": "no two people who are described differently",
                "image_to_image": "only one identity",
                "standard_reid": "only one identity",
            },
        ),
        (
            {"attributes": {"hat": "cap"}},
            {
                "text_to_image": "no two people who are described differently",
                "attribute_comparison": "no two people who are described differently",
            },
        ),
        (
            {"cameras": 1},
            {
                "image_to_image": "no identity seen by two cameras",
                "standard_reid": "no identity seen by two cameras",
            },
        ),
    ],
)
def test_what_a_pool_cannot_give_is_explained(
    make_pool: MakePool, changes: dict[str, Any], missing: dict[str, str]
) -> None:
    pool = make_pool(**changes)
    for task in TASKS:
        reasons = [reason for name, reason in missing.items() if task.startswith(name)]
        assert explain_missing(task, pool) == (reasons[0] if reasons else None)
        if not reasons:
            assert len(draw(task, pool, 20)) == 20


def test_people_who_cannot_be_told_apart_by_their_captions_are_an_error(make_pool: MakePool) -> None:
    pool = make_pool(people=3, attributes={}, captions=("a man",))
    with pytest.raises(DataError, match="Source own: 100 images drawn, and no other person"):
        draw("text_to_image_one_to_one", pool, 1)

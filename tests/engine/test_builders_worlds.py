"""Tests of chatreid_plugin.engine.builders: what must hold for every record of any world, however odd."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatreid_plugin.answers import read_answer, render_answer, render_turns
from chatreid_plugin.config import BuildSettings, Change
from chatreid_plugin.engine.builders import build_draft, explain_missing
from chatreid_plugin.engine.executors import PlacedDraft, assemble_records
from chatreid_plugin.engine.pool import ImageTable, combine_images
from chatreid_plugin.engine.sampler import ImagePool
from chatreid_plugin.errors import DataError
from chatreid_plugin.images import ImagePolicy, count_visual_tokens
from chatreid_plugin.records import Answer, ImageRecord, Instruction, convert_row_to_instruction
from chatreid_plugin.shards import make_manifest_table
from chatreid_plugin.tasks import LETTER_KINDS, TASKS, render_prompt


Images = dict[str, ImageRecord]

# Few values, so that people share looks, cameras see few people, and captions of two people are the same.
CAPTIONS = ("a man in red", "a woman with a bag", "ein Mädchen, grüne Jacke", "someone " * 40)
SIZES = ((20, 40), (64, 128), (192, 384), (400, 900), (128, 64))
LOOKS = {"upper_colour": ("red", "blue"), "hat": ("cap", "none", "hood"), "bag": ("yes", "no")}


@st.composite
def draw_images(draw: st.DrawFn, dataset: str) -> list[ImageRecord]:
    """Draw the images of one source: any labels, any of them missing."""
    people, cameras, count = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 40))
    described, infrared = draw(st.sampled_from((0.0, 0.5, 1.0))), draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    # The labels come from a seed: hypothesis would take long to choose each, and prefers them equal.
    rng = random.Random(draw(st.integers(0, 2**32)))
    records: list[ImageRecord] = []
    for number in range(count):
        path = f"{dataset}/{number}.jpg"
        looks = {name: rng.choice(values) for name, values in LOOKS.items() if rng.random() < described}
        record = ImageRecord(
            path,
            dataset,
            "train",
            path,
            f"{dataset}:{rng.randint(1, people)}",
            str(rng.randint(1, cameras)),
            *rng.choice(SIZES),
            clothes_id=rng.choice((None, "1", "2", "3")),
            modality="infrared" if rng.random() < infrared else "visible",
            captions=tuple(rng.sample(CAPTIONS, rng.randint(0, 2) if rng.random() < described else 0)),
            attributes=looks,
        )
        records.append(record)
    return records


RECIPES = st.builds(
    lambda sizes, matches, hard, cutoff: BuildSettings.model_validate(
        {
            "sources": [{"name": "own", "root": "raw"}],
            "records": {"stage1": 1},
            "gallery": {"min_size": min(sizes), "max_size": max(sizes), "matches": matches, "hard_negatives": hard},
            "cutoff_len": cutoff,
        }
    ),
    st.tuples(st.integers(2, 26), st.integers(2, 26)),
    st.sampled_from(("uniform_overall", "inverse", "uniform")),
    st.sampled_from((0.0, 0.3, 1.0)),
    st.sampled_from((280, 400, 700, 2048, 8192)),
)


def build(task: str, pool: ImagePool, recipe: BuildSettings, seed: int) -> Instruction | None:
    """Return a record, or None if it was refused for one of the two reasons there are."""
    try:
        draft = build_draft(task, pool, random.Random(seed), recipe, "record-0")
    except DataError as error:
        assert "do not fit cutoff_len" in str(error) or "no other person has other attributes" in str(error)
        return None
    table = assemble_records(pool.table, [PlacedDraft(draft, pool.first, 0)], task, ["record-0"])
    return convert_row_to_instruction(table.to_pylist()[0])


def split(record: Instruction, images: Images) -> tuple[ImageRecord, list[ImageRecord], list[ImageRecord]]:
    """Return the query, the gallery's right images and the others."""
    shown = [images[image.path] for image in record.images]
    right = [shown[record.query_images + index] for index in record.answer.indices]
    return shown[0], right, [image for image in shown[record.query_images :] if image not in right]


def check_gallery(record: Instruction, images: Images) -> None:
    query, right, others = split(record, images)
    assert right
    assert {image.person_id for image in right} == {query.person_id}
    assert query.person_id not in {image.person_id for image in others}
    assert len({image.modality for image in [*right, *others]}) == 1


def check_cross_camera(record: Instruction, images: Images) -> None:
    check_gallery(record, images)
    query, right, _ = split(record, images)
    assert query.camera_id not in {image.camera_id for image in right}
    assert query.modality == right[0].modality


def check_cloth_changing(record: Instruction, images: Images) -> None:
    check_cross_camera(record, images)
    query, right, _ = split(record, images)
    assert not {query.clothes_id, None} & {image.clothes_id for image in right}
    assert query.clothes_id is not None


def check_visible_infrared(record: Instruction, images: Images) -> None:
    check_gallery(record, images)
    query, right, _ = split(record, images)
    assert query.modality != right[0].modality


def check_other_words(record: Instruction, images: Images) -> None:
    """The words are another image's of the query's person: in other clothes, or else from another camera."""
    query = images[record.images[0].path]
    same = [i for i in images.values() if i.person_id == query.person_id and i.path != query.path]
    own = [i for i in same if record.captions[0] in i.captions]
    assert own and record.captions[0] not in query.captions
    others = [i for i in same if set(i.captions) - set(query.captions)]
    for tier in (
        [i for i in others if None not in (i.clothes_id, query.clothes_id) and i.clothes_id != query.clothes_id],
        [i for i in others if i.camera_id != query.camera_id],
    ):
        if tier:
            assert any(i in tier for i in own)
            break


def check_multimodal(record: Instruction, images: Images) -> None:
    check_cross_camera(record, images)
    check_other_words(record, images)


def check_multimodal_pair(record: Instruction, images: Images) -> None:
    check_image_pair(record, images)
    check_other_words(record, images)


def check_attribute_pair(record: Instruction, images: Images) -> None:
    asked = {(attribute.name, attribute.value) for attribute in record.attributes}
    assert 1 <= len(asked) == len(record.attributes) <= 3
    assert record.answer.match == (asked <= images[record.images[0].path].attributes.items())


def check_first_turn(record: Instruction, shown: list[ImageRecord]) -> None:
    """Right are the images with all attributes, or all images of those who are described."""
    right, asked = set(record.answer.indices), {(attribute.name, attribute.value) for attribute in record.attributes}
    if asked:
        assert not record.captions and len(asked) == len(record.attributes) <= 3
        assert all(image.attributes for image in shown)
        assert right == {i for i, image in enumerate(shown) if asked <= image.attributes.items()}
        return
    people = {shown[index].person_id for index in right}
    # One of two people may have been left out for want of room.
    assert 1 <= len(people) <= len(set(record.captions)) == len(record.captions) <= 2
    assert right == {i for i, image in enumerate(shown) if image.person_id in people}
    described = [{image.person_id for image in shown if caption in image.captions} for caption in record.captions]
    assert all(len(one) <= 1 for one in described) and set().union(*described) <= people


def check_dialogue(record: Instruction, images: Images) -> None:
    shown = [images[image.path] for image in record.images]
    check_first_turn(record, shown)
    asked = {(attribute.name, attribute.value) for attribute in record.attributes}
    second, *third = record.turns
    assert second.confirmed in record.answer.indices
    confirmed = shown[second.confirmed]
    person = [i for i, image in enumerate(shown) if image.person_id == confirmed.person_id]
    others = [image for image in shown if image.person_id != confirmed.person_id]
    assert list(second.indices) == person and others
    if second.caption:
        assert second.caption not in {*record.captions, *confirmed.captions}
        assert any(second.caption in i.captions for i in images.values() if i.person_id == confirmed.person_id)
        assert not any(second.caption in image.captions for image in others)
    else:
        added = second.name, second.value
        assert added not in asked and all(added in shown[i].attributes.items() for i in person)
        assert not all(added in image.attributes.items() for image in others)
    for turn in third:
        added = turn.name, turn.value
        assert (turn.confirmed, turn.caption) == (None, "") and added not in {*asked, (second.name, second.value)}
        assert list(turn.indices) == [i for i in person if added in shown[i].attributes.items()]
        assert 0 < len(turn.indices) < len(person) and all(shown[i].attributes for i in person)


def check_described(record: Instruction, images: Images) -> None:
    _, right, others = split(record, images)
    (person,) = {image.person_id for image in right}
    assert any(record.captions[0] in image.captions for image in right)
    assert not any(image.person_id == person or record.captions[0] in image.captions for image in others)
    assert 3 in TASKS[record.task].stages or len(right) == 1


def check_asked(record: Instruction, images: Images) -> None:
    _, right, others = split(record, images)
    asked = {(attribute.name, attribute.value) for attribute in record.attributes}
    assert 1 <= len(asked) == len(record.attributes) <= 3
    assert {attribute.image for attribute in record.attributes} == {-1}
    assert right and all(asked <= image.attributes.items() for image in right)
    assert not any(asked <= image.attributes.items() for image in others)


DIFFERS: dict[Change, Callable[[ImageRecord, ImageRecord], bool]] = {
    "any": lambda one, two: one.modality == two.modality,
    "camera": lambda one, two: one.modality == two.modality and one.camera_id != two.camera_id,
    "clothes": lambda one, two: (
        DIFFERS["camera"](one, two)
        and None not in (one.clothes_id, two.clothes_id)
        and one.clothes_id != two.clothes_id
    ),
    "modality": lambda one, two: one.modality != two.modality,
}


def check_image_pair(record: Instruction, images: Images) -> None:
    one, two = (images[image.path] for image in record.images)
    assert record.answer.match == (one.person_id == two.person_id)


def check_text_pair(record: Instruction, images: Images) -> None:
    assert record.answer.match == (record.captions[0] in images[record.images[0].path].captions)


def check_caption_choice(record: Instruction, images: Images) -> None:
    own = images[record.images[0].path].captions
    assert record.answer.indices == tuple(i for i, caption in enumerate(record.captions) if caption in own)
    assert len(record.answer.indices) == 1


def check_comparison(record: Instruction, images: Images) -> None:
    for position, image in enumerate(record.images):
        shown = {a.name: a.value for a in record.attributes if a.image == position}
        assert shown == images[image.path].attributes != {}


def check_caption(record: Instruction, images: Images) -> None:
    assert record.answer.text in images[record.images[0].path].captions


CHECKS: dict[str, Callable[[Instruction, Images], None]] = {
    "image_captioning": check_caption,
    "image_to_image_one_to_one": check_image_pair,
    "image_to_image_many_to_many": check_gallery,
    "text_to_image_one_to_one": check_text_pair,
    "text_to_image_many_to_one": check_caption_choice,
    "text_to_image_one_to_many": check_described,
    "attribute_comparison": check_comparison,
    "attribute_prediction": check_comparison,
    "standard_reid": check_cross_camera,
    "cloth_changing_reid": check_cloth_changing,
    "visible_infrared_reid": check_visible_infrared,
    "text_to_image_reid": check_described,
    "attribute_retrieval": check_asked,
    "multimodal_retrieval": check_multimodal,
    "dialogue_retrieval": check_dialogue,
    "attribute_one_to_one": check_attribute_pair,
    "multimodal_one_to_one": check_multimodal_pair,
}


def check_form(record: Instruction, recipe: BuildSettings) -> None:
    """No image twice, no letter of an absent image, no more tokens than there is room for."""
    task = TASKS[record.task]
    assert len({image.path for image in record.images}) == len(record.images)
    assert record.gallery_size <= recipe.gallery.max_size
    options = max(record.gallery_size, len(record.captions))
    assert all(0 <= index < options for index in record.answer.indices)
    policy = ImagePolicy(task.stages[0])
    tokens = sum(count_visual_tokens(image.width, image.height, policy) + 5 for image in record.images)
    texts = [*record.captions, *(a.name + a.value for a in record.attributes), record.answer.text or ""]
    texts += [turn.caption or turn.name + turn.value for turn in record.turns]
    assert (
        tokens + 256 + 128 * len(record.turns) + sum(len(text) // 3 + 1 for text in texts if text) <= recipe.cutoff_len
    )


def check_rendering(record: Instruction) -> None:
    """The prompt shows every image, and the answer is read back as it was."""
    assert render_prompt(record).count("<image>") == len(record.images)
    answer = render_answer(record)
    kind = TASKS[record.task].answer_kind
    read = kind in ("match", *LETTER_KINDS, "ordinal")
    options = max(record.gallery_size, len(record.captions))
    assert read_answer(record.task, answer, options) == (record.answer if read else Answer(text=answer))
    for (_, further), turn in zip(render_turns(record)[1:], record.turns, strict=True):
        assert read_answer(record.task, further, options) == Answer(turn.indices)


def check_changes(record: Instruction, images: Images, changes: Sequence[Change]) -> None:
    """A match of a pair or a many-to-many gallery differs from the query as the source asks."""
    if record.task == "image_to_image_many_to_many":
        query, right, _ = split(record, images)
    elif record.task == "image_to_image_one_to_one" and record.answer.match:
        query, *right = (images[image.path] for image in record.images)
    else:
        return
    assert any(all(DIFFERS[change](query, image) for image in right) for change in changes)


def test_every_task_is_checked() -> None:
    assert set(CHECKS) == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    first=draw_images("one"),
    second=draw_images("two"),
    recipe=RECIPES,
    changes=st.sampled_from((("any",), ("camera",), ("clothes",), ("modality",), ("camera", "clothes", "modality"))),
    seed=st.integers(0, 2**32),
)
def test_every_record_of_any_world_is_true(
    task: str, first: list[ImageRecord], second: list[ImageRecord], recipe: Any, changes: tuple[Change, ...], seed: int
) -> None:
    images = {record.path: record for record in [*first, *second]}
    table = ImageTable(combine_images([make_manifest_table(records) for records in (first, second)]))
    for source in table.sources:
        pool = ImagePool(table, source, ImagePolicy(TASKS[task].stages[0])).with_changes(dict.fromkeys(changes, 1.0))
        if explain_missing(task, pool) is not None:
            continue
        for number in range(10):
            record = build(task, pool, recipe, seed + number)
            if record is not None:
                assert record.dataset == source.name
                check_form(record, recipe)
                CHECKS[task](record, images)
                check_changes(record, images, pool.list_changes())
                check_rendering(record)

"""Tests of chatreid_plugin.records: what a record is, is what comes back from Arrow."""

import dataclasses

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatreid_plugin.errors import DataError
from chatreid_plugin.records import (
    IMAGE_RECORD_SCHEMA,
    INSTRUCTION_SCHEMA,
    Answer,
    Attribute,
    ImageRecord,
    ImageReference,
    Instruction,
    Turn,
    convert_image_record_to_row,
    convert_instruction_to_row,
    convert_row_to_image_record,
    convert_row_to_instruction,
)


texts = st.text(st.characters(codec="utf-8"), max_size=20)
sizes = st.integers(0, 2**31 - 1)
small = st.integers(0, 2**15 - 1)
image_records = st.builds(
    ImageRecord,
    image_id=texts,
    dataset=texts,
    split=st.sampled_from(["train", "val", "query", "gallery"]),
    path=texts,
    person_id=texts,
    camera_id=texts,
    width=sizes,
    height=sizes,
    clothes_id=st.none() | texts,
    modality=st.sampled_from(["visible", "infrared"]),
    captions=st.lists(texts, max_size=3).map(tuple),
    attributes=st.dictionaries(texts, texts, max_size=3),
)
instructions = st.builds(
    Instruction,
    id=texts,
    task=texts,
    images=st.lists(st.builds(ImageReference, texts, sizes, sizes), max_size=3).map(tuple),
    query_images=small,
    answer=st.builds(Answer, st.lists(small, max_size=3).map(tuple), st.none() | st.booleans(), st.none() | texts),
    captions=st.lists(texts, max_size=3).map(tuple),
    attributes=st.lists(st.builds(Attribute, small, texts, texts), max_size=3).map(tuple),
    dataset=texts,
    variant=small,
    turns=st.lists(
        st.builds(Turn, st.lists(small, max_size=3).map(tuple), st.none() | small, texts, texts, texts), max_size=3
    ).map(tuple),
)


@settings(deadline=None)
@given(st.lists(image_records, max_size=3))
def test_image_records_come_back_from_arrow(records: list[ImageRecord]) -> None:
    rows = [convert_image_record_to_row(record) for record in records]
    table = pa.Table.from_pylist(rows, schema=IMAGE_RECORD_SCHEMA)
    assert [convert_row_to_image_record(row) for row in table.to_pylist()] == records


@settings(deadline=None)
@given(st.lists(instructions, max_size=3))
def test_instructions_come_back_from_arrow(records: list[Instruction]) -> None:
    rows = [convert_instruction_to_row(record) for record in records]
    table = pa.Table.from_pylist(rows, schema=INSTRUCTION_SCHEMA)
    assert [convert_row_to_instruction(row) for row in table.to_pylist()] == records


def test_attributes_keep_their_order() -> None:
    record = ImageRecord("a/b", "a", "train", "b", "a:1", "1", 1, 1, attributes={"hat": "no", "age": "young"})
    back = convert_row_to_image_record(convert_image_record_to_row(record))
    assert list(back.attributes) == ["hat", "age"]


def test_missing_columns_are_named_with_what_was_found() -> None:
    with pytest.raises(
        DataError, match=r"task, images, .*variant are missing \(found: id, messages\).*chatreid build"
    ):
        convert_row_to_instruction({"id": "1", "messages": []})


def test_empty_cells_are_empty_values() -> None:
    row = dict.fromkeys(INSTRUCTION_SCHEMA.names) | {"id": "1", "task": "t", "query_images": 0, "variant": 0}
    row |= {"images": [{"path": "a.jpg", "width": None, "height": None}], "dataset": ""}
    assert convert_row_to_instruction(row) == Instruction("1", "t", (ImageReference("a.jpg"),), 0, Answer())


def test_record_of_a_version_without_dialogues_is_read() -> None:
    record = Instruction("1", "t", (ImageReference("a.jpg"),), 0, Answer((0,)), dataset="own")
    row = convert_instruction_to_row(record)
    del row["turns"]
    assert convert_row_to_instruction(row) == record


def test_gallery_is_what_follows_the_query() -> None:
    images = tuple(ImageReference(str(number)) for number in range(5))
    assert Instruction("1", "t", images, 2, Answer()).gallery_size == 3


def test_records_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ImageReference("a").path = "b"  # type: ignore[misc]

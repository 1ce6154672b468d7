"""Tests of chatreid_plugin.engine.drafts: drafts become exactly the rows that the records stand for."""

from dataclasses import replace

import pyarrow as pa

from chatreid_plugin.engine.drafts import Draft, PlacedDraft, assemble_records
from chatreid_plugin.engine.image_table import ImageTable, combine_images
from chatreid_plugin.records import (
    INSTRUCTION_SCHEMA,
    Answer,
    Attribute,
    ImageRecord,
    ImageReference,
    Instruction,
    convert_instruction_to_row,
    convert_row_to_instruction,
)
from chatreid_plugin.shards import make_manifest_table


def make_images(dataset: str, count: int, described: int) -> list[ImageRecord]:
    """Return images of which the first ``described`` have two captions and two attributes each."""
    records: list[ImageRecord] = []
    for number in range(count):
        path = f"{dataset}/{number}.jpg"
        record = ImageRecord(path, dataset, "train", path, f"{dataset}:{number}", "1", 10 + number, 20 + number)
        if number < described:
            looks = {"hat": f"{path} hat", "bag": f"{path} bag"}
            record = replace(record, captions=(f"{path} one", f"{path} two"), attributes=looks)
        records.append(record)
    return records


TABLE = ImageTable(
    combine_images([make_manifest_table(make_images("a", 3, 2)), make_manifest_table(make_images("b", 4, 4))])
)


def assemble(*placed: PlacedDraft, task: str = "standard_reid") -> list[Instruction]:
    table = assemble_records(TABLE, placed, task, [f"r-{number}" for number in range(len(placed))])
    assert table.schema.equals(INSTRUCTION_SCHEMA)
    table.validate(full=True)
    return [convert_row_to_instruction(row) for row in table.to_pylist()]


def refer(dataset: str, *numbers: int) -> tuple[ImageReference, ...]:
    return tuple(ImageReference(f"{dataset}/{number}.jpg", 10 + number, 20 + number) for number in numbers)


def test_images_are_those_of_the_drafts_source() -> None:
    # The second source begins with row 3.
    first, second = assemble(
        PlacedDraft(Draft([2, 0, 1], 1, [1]), 0, 0), PlacedDraft(Draft([3, 1, 0, 2], 1, [2, 0]), 3, 1)
    )
    assert first == Instruction("r-0", "standard_reid", refer("a", 2, 0, 1), 1, Answer((1,)), dataset="a")
    assert second == Instruction(
        "r-1", "standard_reid", refer("b", 3, 1, 0, 2), 1, Answer((0, 2)), dataset="b", variant=1
    )


def test_captions_and_attributes_are_numbers_of_the_whole_table() -> None:
    # Images of the first source have captions 0 to 3; those of the second begin with 4.
    placed = [
        PlacedDraft(Draft([1], 1, captions=[2, 3]), 0, 0),
        PlacedDraft(Draft([0, 2], 2, captions=[4], attributes=[(0, 5), (1, 8), (-1, 9)]), 3, 0),
    ]
    first, second = assemble(*placed, task="attribute_comparison")
    assert first.captions == ("a/1.jpg one", "a/1.jpg two")
    assert first.attributes == ()
    assert second.captions == ("b/0.jpg one",)
    assert second.attributes == (
        Attribute(0, "bag", "b/0.jpg bag"),
        Attribute(1, "hat", "b/2.jpg hat"),
        Attribute(-1, "bag", "b/2.jpg bag"),
    )


def test_answers_are_indices_a_match_or_a_text() -> None:
    drafts = [
        Draft([0, 1], 2, match=True),
        Draft([0, 1], 2, match=False),
        Draft([1], 1, text=11),
        Draft([1, 0], 1, [0]),
    ]
    records = assemble(*(PlacedDraft(draft, 3, 0) for draft in drafts))
    assert [record.answer for record in records] == [
        Answer(match=True),
        Answer(match=False),
        Answer(text="b/3.jpg two"),
        Answer((0,)),
    ]


def test_rows_are_those_of_the_instructions() -> None:
    placed = [
        PlacedDraft(Draft([0, 2, 1], 1, [1], captions=[0], attributes=[(0, 1)]), 0, 2),
        PlacedDraft(Draft([3], 1, text=4), 3, 0),
    ]
    table = assemble_records(TABLE, placed, "multimodal_retrieval", ["x-0", "x-1"])
    rows = [convert_instruction_to_row(convert_row_to_instruction(row)) for row in table.to_pylist()]
    assert table.equals(pa.Table.from_pylist(rows, INSTRUCTION_SCHEMA))

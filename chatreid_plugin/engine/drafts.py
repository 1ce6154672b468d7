"""What a builder decides about a record, and how many drafts become the columns of one shard at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..records import INSTRUCTION_SCHEMA
from .arrow_compute import pc
from .image_table import ImageTable


@dataclass(frozen=True, slots=True)
class DraftTurn:
    """A further turn of a dialogue, by numbers; see ``records.Turn``.

    Attributes:
        matches: positions (0-based) of the right answers in the gallery.
        confirmed: position of the image that the user confirms, if any.
        caption: number of the caption that is added, or None.
        attribute: number of the attribute that is added, or None.
    """

    matches: Sequence[int]
    confirmed: int | None = None
    caption: int | None = None
    attribute: int | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """One record, by numbers: images are rows of the pool, captions and attributes numbers in the table.

    Attributes:
        images: the query image(s) first, then the gallery.
        query_images: how many of them are the query.
        matches: positions (0-based) of the right answers in the gallery or among the captions.
        match: yes or no.
        text: number of the caption that is the answer.
        captions: what the prompt quotes.
        attributes: (position of the image, number of the attribute); position -1 is what the query asks for.
        turns: of a dialogue, what is asked after the first answer.
    """

    images: Sequence[int]
    query_images: int
    matches: Sequence[int] = ()
    match: bool | None = None
    text: int | None = None
    captions: Sequence[int] = ()
    attributes: Sequence[tuple[int, int]] = ()
    turns: Sequence[DraftTurn] = ()


@dataclass(frozen=True, slots=True)
class PlacedDraft:
    """A draft with the row of its pool's first image and the number of its wording."""

    draft: Draft
    first_row: int
    variant: int


def assemble_records(table: ImageTable, placed: Sequence[PlacedDraft], task: str, ids: Sequence[str]) -> pa.Table:
    """Return the rows of ``INSTRUCTION_SCHEMA`` for drafts of one task.

    Args:
        table: the images that the drafts' numbers mean.
        placed: the drafts.
        task: a name of ``tasks.TASKS``.
        ids: the records' ids.
    """
    drafts = [item.draft for item in placed]
    rows = np.array([item.first_row + image for item in placed for image in item.draft.images], dtype=np.int64)
    sizes = [len(draft.images) for draft in drafts]
    first_rows = rows[np.cumsum([0, *sizes[:-1]])]
    columns = {
        "id": pa.array(ids, pa.string()),
        "task": pa.DictionaryArray.from_arrays(np.zeros(len(ids), dtype=np.int8), [task]).cast(pa.string()),
        "images": _make_lists(sizes, _take_images(table, rows)),
        "query_images": pa.array([draft.query_images for draft in drafts], pa.int16()),
        "captions": _make_lists(
            [len(draft.captions) for draft in drafts],
            _take_text(table.captions, [number for draft in drafts for number in draft.captions]),
        ),
        "attributes": _make_lists([len(draft.attributes) for draft in drafts], _take_attributes(table, drafts)),
        "answer": _make_answers(table, drafts),
        "dataset": _take_text(table.get_column("dataset"), first_rows),
        "variant": pa.array([item.variant for item in placed], pa.int16()),
        "turns": _make_lists([len(draft.turns) for draft in drafts], _make_turns(table, drafts)),
    }
    return pa.Table.from_arrays([columns[name] for name in INSTRUCTION_SCHEMA.names], schema=INSTRUCTION_SCHEMA)


def _make_lists(sizes: Sequence[int], values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(np.cumsum([0, *sizes], dtype=np.int32), values)


def _take_text(texts: pa.Array, numbers: Sequence[int | None] | np.ndarray) -> pa.Array:
    return texts.take(pa.array(numbers, pa.int64())).cast(pa.string())


def _take_images(table: ImageTable, rows: np.ndarray) -> pa.Array:
    sizes = [table.get_column(name).take(pa.array(rows)) for name in ("width", "height")]
    return pa.StructArray.from_arrays(
        [_take_text(table.get_column("path"), rows), *sizes], names=["path", "width", "height"]
    )


def _take_attributes(table: ImageTable, drafts: Sequence[Draft]) -> pa.Array:
    pairs = [pair for draft in drafts for pair in draft.attributes]
    numbers = [number for _, number in pairs]
    texts = [_take_text(table.attributes.field(name), numbers) for name in ("name", "value")]
    return pa.StructArray.from_arrays(
        [pa.array([image for image, _ in pairs], pa.int16()), *texts], names=["image", "name", "value"]
    )


def _make_answers(table: ImageTable, drafts: Sequence[Draft]) -> pa.Array:
    indices = pa.array([index for draft in drafts for index in sorted(draft.matches)], pa.int16())
    fields = [
        _make_lists([len(draft.matches) for draft in drafts], indices),
        pa.array([draft.match for draft in drafts], pa.bool_()),
        _take_text(table.captions, [draft.text for draft in drafts]),
    ]
    return pa.StructArray.from_arrays(fields, names=["indices", "match", "text"])


def _make_turns(table: ImageTable, drafts: Sequence[Draft]) -> pa.Array:
    turns = [turn for draft in drafts for turn in draft.turns]
    indices = pa.array([index for turn in turns for index in sorted(turn.matches)], pa.int16())
    attributes = [turn.attribute for turn in turns]
    texts = [
        _take_text(table.captions, [turn.caption for turn in turns]),
        *(_take_text(table.attributes.field(name), attributes) for name in ("name", "value")),
    ]
    fields = [
        _make_lists([len(turn.matches) for turn in turns], indices),
        pa.array([turn.confirmed for turn in turns], pa.int16()),
        *(pc.fill_null(text, "") for text in texts),
    ]
    return pa.StructArray.from_arrays(fields, names=["indices", "confirmed", "caption", "name", "value"])

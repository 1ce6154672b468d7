"""The nouns that pass between the parts: one person image, one instruction record, its answer."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from .errors import DataError


Split = Literal["train", "val", "query", "gallery"]
Modality = Literal["visible", "infrared"]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One person crop of one data set.

    Attributes:
        image_id: unique over all data sets: ``<dataset>/<path below the data set's folder>``.
        dataset: lower-case name, e.g. ``market1501``.
        split: ``train``, ``val``, ``query`` or ``gallery``.
        path: file path relative to the data root, with forward slashes.
        person_id: ``<dataset>:<identity as published>``, so that identities of two data sets never collide.
        camera_id: as published; identities seen by one camera only have no cross-camera positive.
        width: pixels.
        height: pixels.
        clothes_id: outfit label where the data set has one.
        modality: ``visible`` or ``infrared``.
        captions: sentences that describe the person, in the order of the data set's file; of a tested image, an empty
            text stands where the file has an empty one.
        attributes: attribute name to value, e.g. ``{"upper_colour": "red"}``.
        content_hash: of the file's bytes, hexadecimal; empty if nobody looked at the file.
        perceptual_hash: pHash, 256 bits, hexadecimal; empty if nobody looked.
        sharpness: variance of the Laplacian (``engine/image_facts.py``); None if nobody looked.
        brightness: mean grey level, 0 to 255; None if nobody looked.
    """

    image_id: str
    dataset: str
    split: Split
    path: str
    person_id: str
    camera_id: str
    width: int
    height: int
    clothes_id: str | None = None
    modality: Modality = "visible"
    captions: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])
    content_hash: str = ""
    perceptual_hash: str = ""
    sharpness: float | None = None
    brightness: float | None = None


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image inside an instruction: path relative to the image root, and its size in pixels (0 = unknown)."""

    path: str
    width: int = 0
    height: int = 0


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute of the image at position ``image`` of an instruction; -1 if the query asks for it."""

    image: int
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The right answer of an instruction; which field is set depends on the task.

    Attributes:
        indices: positions (0-based) inside the gallery, or of the right caption.
        match: yes or no.
        text: a free text, e.g. a caption.
    """

    indices: tuple[int, ...] = ()
    match: bool | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A further question of a dialogue on the first one's gallery; it adds one detail, a caption or an attribute.

    Attributes:
        indices: positions (0-based) of the right answers in the gallery.
        confirmed: position of the gallery image that the user confirms as the person; None if none is named.
        caption: the detail in words; empty if it is an attribute.
        name: the attribute's name.
        value: the attribute's value.
    """

    indices: tuple[int, ...]
    confirmed: int | None = None
    caption: str = ""
    name: str = ""
    value: str = ""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One training record, compact: the task table renders prompt and answer when it is read.

    Attributes:
        id: unique within its data set, e.g. ``stage2_attribute_prediction-0000000017``.
        task: a name of ``tasks.TASKS``.
        images: the query image(s) first, then the gallery in letter order.
        query_images: how many of ``images`` are the query.
        captions: descriptions that the prompt quotes.
        attributes: attribute values of the images, for the attribute tasks.
        answer: the right answer.
        dataset: where the query comes from.
        variant: which wording of the task's prompt; 0 is the paper's, from 100 on they are the user's own.
        turns: of a dialogue, what is asked after the first answer.
    """

    id: str
    task: str
    images: tuple[ImageReference, ...]
    query_images: int
    answer: Answer
    captions: tuple[str, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    dataset: str = ""
    variant: int = 0
    turns: tuple[Turn, ...] = ()

    @property
    def gallery_size(self) -> int:
        """Number of gallery images."""
        return len(self.images) - self.query_images


_TEXT, _INDEX, _SIDE = pa.string(), pa.int16(), pa.int32()


def _list_of(**fields: pa.DataType) -> pa.DataType:
    # No Arrow map type: datasets 4.0.0 (LLaMA-Factory's cap) cannot read one.
    return pa.list_(pa.struct(list(fields.items())))


IMAGE_RECORD_SCHEMA = pa.schema(
    [
        *((name, _TEXT) for name in ("image_id", "dataset", "split", "path", "person_id", "camera_id")),
        ("width", _SIDE),
        ("height", _SIDE),
        ("clothes_id", _TEXT),
        ("modality", _TEXT),
        ("captions", pa.list_(_TEXT)),
        ("attributes", _list_of(name=_TEXT, value=_TEXT)),
        ("content_hash", _TEXT),
        ("perceptual_hash", _TEXT),
        ("sharpness", pa.float64()),
        ("brightness", pa.float64()),
    ]
)
INSTRUCTION_SCHEMA = pa.schema(
    [
        ("id", _TEXT),
        ("task", _TEXT),
        ("images", _list_of(path=_TEXT, width=_SIDE, height=_SIDE)),
        ("query_images", _INDEX),
        ("captions", pa.list_(_TEXT)),
        ("attributes", _list_of(image=_INDEX, name=_TEXT, value=_TEXT)),
        ("answer", pa.struct([("indices", pa.list_(_INDEX)), ("match", pa.bool_()), ("text", _TEXT)])),
        ("dataset", _TEXT),
        ("variant", _INDEX),
        ("turns", _list_of(indices=pa.list_(_INDEX), confirmed=_INDEX, caption=_TEXT, name=_TEXT, value=_TEXT)),
    ]
)
# Columns that records of earlier versions lack; they are read as if these were empty.
ADDED_COLUMNS = ("turns",)


def convert_image_record_to_row(record: ImageRecord) -> dict[str, Any]:
    """Return the record as a row of ``IMAGE_RECORD_SCHEMA``."""
    row = {name: getattr(record, name) for name in IMAGE_RECORD_SCHEMA.names}
    row["captions"] = list(record.captions)
    row["attributes"] = [{"name": name, "value": value} for name, value in record.attributes.items()]
    return row


def convert_row_to_image_record(row: Mapping[str, Any]) -> ImageRecord:
    """Return the record of a row of ``IMAGE_RECORD_SCHEMA``."""
    fields = {name: row[name] for name in IMAGE_RECORD_SCHEMA.names}
    fields["captions"] = tuple(row["captions"] or ())
    fields["attributes"] = {item["name"]: item["value"] for item in row["attributes"] or ()}
    return ImageRecord(**fields)


def convert_instruction_to_row(record: Instruction) -> dict[str, Any]:
    """Return the instruction as a row of ``INSTRUCTION_SCHEMA``."""
    return {
        "id": record.id,
        "task": record.task,
        "images": [{"path": image.path, "width": image.width, "height": image.height} for image in record.images],
        "query_images": record.query_images,
        "captions": list(record.captions),
        "attributes": [{"image": a.image, "name": a.name, "value": a.value} for a in record.attributes],
        "answer": {
            "indices": list(record.answer.indices),
            "match": record.answer.match,
            "text": record.answer.text,
        },
        "dataset": record.dataset,
        "variant": record.variant,
        "turns": [
            {
                "indices": list(turn.indices),
                "confirmed": turn.confirmed,
                "caption": turn.caption,
                "name": turn.name,
                "value": turn.value,
            }
            for turn in record.turns
        ],
    }


def list_missing_columns(names: Collection[str]) -> list[str]:
    """Return the columns of ``INSTRUCTION_SCHEMA`` that records cannot do without and that are not among ``names``."""
    return [name for name in INSTRUCTION_SCHEMA.names if name not in names and name not in ADDED_COLUMNS]


def convert_row_to_instruction(row: Mapping[str, Any]) -> Instruction:
    """Return the instruction of a row of ``INSTRUCTION_SCHEMA`` (a dict, as Arrow or datasets give it).

    Raises:
        DataError: a column is missing, or a value in one.
    """
    missing = list_missing_columns(row)
    if missing:
        raise DataError(
            f"This is not a ChatReID record: column(s) {', '.join(missing)} are missing (found: {', '.join(row)}). "
            "Build the data set with `chatreid build`, or set the right `formatting` in dataset_info.json."
        )
    try:
        return _make_instruction(row)
    except (TypeError, KeyError) as error:  # null where a value belongs
        raise DataError(
            f"Record {row['id']} is damaged ({error}). Build the data set with `chatreid build`."
        ) from None


def _make_instruction(row: Mapping[str, Any]) -> Instruction:
    answer = row["answer"] or {}
    return Instruction(
        id=row["id"],
        task=row["task"],
        images=tuple(ImageReference(i["path"], i["width"] or 0, i["height"] or 0) for i in row["images"] or ()),
        query_images=row["query_images"],
        captions=tuple(row["captions"] or ()),
        attributes=tuple(Attribute(a["image"], a["name"], a["value"]) for a in row["attributes"] or ()),
        answer=Answer(tuple(answer.get("indices") or ()), answer.get("match"), answer.get("text")),
        dataset=row["dataset"],
        variant=row["variant"],
        turns=tuple(
            Turn(tuple(t["indices"] or ()), t["confirmed"], *(t[name] or "" for name in ("caption", "name", "value")))
            for t in row.get("turns") or ()
        ),
    )

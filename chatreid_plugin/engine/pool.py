"""The training images of a recipe in columns, in one file that every worker process maps into its memory.

An image is a row from here on, and a record that is drawn (``Draft``) holds rows and numbers. Columns instead of
ImageRecords: a million images take some hundred megabytes once, not some gigabytes in each process.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from ..images import ImagePolicy, count_visual_tokens
from ..shards import open_atomically, pc


Codes = npt.NDArray[np.int64]


# English takes about 4.5 bytes a token and Chinese 3 or more; fewer here, so that a caption is not underestimated.
BYTES_PER_TOKEN = 3
_SOURCES = b"sources"
# A column that hard negatives by features add (``look_alikes``): rows of the source.
LOOK_ALIKES = "look_alikes"
# Texts of more than 2 GiB need 64-bit offsets.
_TEXT = pa.large_string()
_SCHEMA = pa.schema(
    [
        ("dataset", _TEXT),
        ("path", _TEXT),
        ("person_id", _TEXT),
        ("camera_id", _TEXT),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("clothes_id", _TEXT),
        ("modality", _TEXT),
        ("captions", pa.large_list(_TEXT)),
        ("attributes", pa.large_list(pa.struct([("name", _TEXT), ("value", _TEXT)]))),
    ]
)


@dataclass(frozen=True, slots=True)
class SourceRows:
    """The rows of one source: ``first`` (included) to ``last`` (excluded)."""

    name: str
    first: int
    last: int


def combine_images(tables: Sequence[pa.Table]) -> pa.Table:
    """Return the images of all sources (tables of ``IMAGE_RECORD_SCHEMA``, one per source) as one table."""
    whole = pa.concat_tables([table.select(_SCHEMA.names).cast(_SCHEMA) for table in tables]).combine_chunks()
    ends = np.cumsum([table.num_rows for table in tables]).tolist()
    names = [table["dataset"][0].as_py() for table in tables]
    bounds = json.dumps(list(zip(names, [0, *ends[:-1]], ends, strict=True)))
    return whole.replace_schema_metadata({_SOURCES: bounds})


def write_image_table(path: Path, table: pa.Table) -> None:
    """Write a table of ``combine_images`` as an Arrow file."""
    with open_atomically(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=table.num_rows)


@lru_cache(maxsize=1)
def open_image_table(path: Path, digest: str) -> "ImageTable":
    """Map a file of ``write_image_table`` into memory.

    Args:
        path: the file.
        digest: names the content, so that a process that serves several builds never mixes them up.
    """
    return ImageTable(pa.ipc.open_file(pa.memory_map(str(path))).read_all())


def digest_images(table: pa.Table) -> str:
    """Return a hash over the values of a table, however Arrow lays them out."""
    digest = xxhash.xxh3_128(table.schema.metadata[_SOURCES])
    for column in table.columns:
        _digest_array(digest, column.combine_chunks())
    return digest.hexdigest()


def _digest_array(digest: "xxhash.xxh3_128", array: pa.Array) -> None:
    if pa.types.is_large_list(array.type):
        digest.update(pc.list_value_length(array).to_numpy().tobytes())
        _digest_array(digest, array.flatten())
    elif pa.types.is_struct(array.type):
        for field in array.flatten():
            _digest_array(digest, field)
    elif pa.types.is_large_string(array.type):
        # No text holds a zero byte, so that null is told from an empty text.
        filled = pc.fill_null(array, "\0")
        _, offsets, data = filled.buffers()
        bounds = np.frombuffer(offsets, np.int64)[filled.offset : filled.offset + len(filled) + 1]
        digest.update(np.diff(bounds).tobytes())
        if len(filled) and bounds[-1] > bounds[0]:
            digest.update(data.slice(int(bounds[0]), int(bounds[-1] - bounds[0])))
    else:
        digest.update(array.to_numpy().tobytes())


class ImageTable:
    """The columns, and codes that make comparing them quick.

    Attributes:
        table: one row per image; see ``ImageRecord``.
        sources: which rows belong to which source.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        # Worked out once, though every source asks.
        self._tokens: dict[ImagePolicy, Codes] = {}
        self._values: dict[str, Codes] = {}
        self.sources = [SourceRows(*bounds) for bounds in json.loads(table.schema.metadata[_SOURCES])]

    def get_column(self, name: str) -> pa.Array:
        """Return a column as one array."""
        column = self.table.column(name)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def list_look_alikes(self, rows: slice) -> npt.NDArray[np.int32] | None:
        """Return the look-alikes of some images, one image's after another's; None if features were not compared."""
        if LOOK_ALIKES not in self.table.column_names:
            return None
        column = self.get_column(LOOK_ALIKES)
        starts = column.offsets.to_numpy()
        return column.values.to_numpy()[starts[rows.start] : starts[rows.stop]]

    def encode(self, name: str, rows: slice = slice(None)) -> Codes:
        """Return numbers that are equal where the column is, for some rows; -1 where it is null."""
        return encode(self.get_column(name)[rows])

    @cached_property
    def caption_starts(self) -> Codes:
        """Where each image's captions begin among all captions; one longer than the images."""
        return self.get_column("captions").offsets.to_numpy().astype(np.int64)

    @cached_property
    def captions(self) -> pa.Array:
        """All captions, image by image."""
        return self.get_column("captions").values

    @cached_property
    def caption_codes(self) -> Codes:
        """Numbers that are equal where captions are."""
        return encode(self.captions)

    @cached_property
    def attribute_starts(self) -> Codes:
        """Where each image's attributes begin among all attributes; one longer than the images."""
        return self.get_column("attributes").offsets.to_numpy().astype(np.int64)

    @cached_property
    def attributes(self) -> pa.Array:
        """All attributes (name, value), image by image."""
        return self.get_column("attributes").values

    @cached_property
    def attribute_codes(self) -> Codes:
        """Numbers that are equal where name and value of an attribute are."""
        names, values = encode(self.attributes.field("name")), encode(self.attributes.field("value"))
        return number(names, values)

    @cached_property
    def looks(self) -> Codes:
        """Numbers that are equal where images have the same attributes, in whatever order."""
        # A sum of one random number per attribute: equal sums of different attributes are as unlikely as 2**-64.
        keys = np.random.default_rng(0).integers(2**63, size=int(self.attribute_codes.max(initial=0)) + 1)
        sums = np.concatenate([[0], np.cumsum(keys[self.attribute_codes])])
        own = sums[self.attribute_starts[1:]] - sums[self.attribute_starts[:-1]]
        return np.unique(own, return_inverse=True)[1].astype(np.int64)

    def encode_attribute(self, name: str) -> Codes:
        """Return the value's number of one attribute for each image; -1 where it has none."""
        if name not in self._values:
            self._values[name] = self._encode_attribute(name)
        return self._values[name]

    def _encode_attribute(self, name: str) -> Codes:
        chosen = np.flatnonzero(pc.equal(self.attributes.field("name"), name).to_numpy(zero_copy_only=False))
        owners = np.searchsorted(self.attribute_starts, chosen, side="right") - 1
        codes = np.full(self.table.num_rows, -1, dtype=np.int64)
        codes[owners] = self.attribute_codes[chosen]
        return codes

    def count_tokens(self, policy: ImagePolicy) -> Codes:
        """Return each image's visual tokens under a policy; each size is counted once."""
        if policy not in self._tokens:
            self._tokens[policy] = self._count_tokens(policy)
        return self._tokens[policy]

    def _count_tokens(self, policy: ImagePolicy) -> Codes:
        sizes = np.stack([self.get_column(name).to_numpy().astype(np.int64) for name in ("width", "height")], axis=1)
        unique, inverse = np.unique(sizes, axis=0, return_inverse=True)
        counts = np.array([count_visual_tokens(int(w), int(h), policy) for w, h in unique], dtype=np.int64)
        return counts[inverse.ravel()]

    @cached_property
    def caption_tokens(self) -> Codes:
        """About how many tokens each caption takes."""
        return pc.binary_length(self.captions).to_numpy().astype(np.int64) // BYTES_PER_TOKEN + 1

    @cached_property
    def attribute_tokens(self) -> Codes:
        """About how many tokens each attribute takes, name and value."""
        lengths = [pc.binary_length(self.attributes.field(name)).to_numpy() for name in ("name", "value")]
        return (lengths[0] + lengths[1]).astype(np.int64) // BYTES_PER_TOKEN + 1


def encode(column: pa.Array) -> Codes:
    """Return numbers that are equal where a column's values are; -1 for null."""
    return pc.fill_null(column.dictionary_encode().indices, -1).to_numpy().astype(np.int64)


# An array as a memoryview: compact like the array, and its items are plain ints.
Numbers = memoryview
_GUESSES = 8
_SMALLEST_SPARSE = 1 << 20


def view(numbers: npt.NDArray[np.integer]) -> Numbers:
    """Return an array of numbers as a memoryview of 64-bit integers."""
    return np.ascontiguousarray(numbers, dtype=np.int64).data


def number(*labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return numbers 0, 1, ... that are equal where all labels (from -1) are."""
    combined = np.zeros(len(labels[0]), dtype=np.int64)
    for codes in labels:
        # Numbered again each time, so that products stay far below 64 bits.
        combined = combined * (int(codes.max(initial=0)) + 2) + codes + 1
        if combined.max(initial=0) > _SMALLEST_SPARSE + 4 * len(combined):
            combined = np.unique(combined, return_inverse=True)[1]
        else:
            # Sorting is ten times slower than counting, as long as there is a place for every label.
            combined = (np.cumsum(np.bincount(combined) > 0) - 1)[combined]
    return combined


class Groups:
    """Rows by label, compactly: no object per group, so that a million identities cost no more than a million rows.

    Attributes:
        labels: the label of each row, from 0.
    """

    def __init__(self, labels: npt.NDArray[np.int64], members: npt.NDArray[np.int64] | None = None) -> None:
        """Group rows by label.

        Args:
            labels: one for each row, numbers from -1.
            members: what stands in the groups instead of the rows' own numbers.
        """
        labels = number(labels)
        order = np.argsort(labels, kind="stable")
        self.labels = view(labels)
        self._order = view(order if members is None else members[order])
        self._starts = view(np.concatenate([[0], np.cumsum(np.bincount(labels))]))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def list_alike(self, row: int) -> Numbers:
        """Return the rows (or members) with the same label as ``row``, in their order."""
        label = self.labels[row]
        return self._order[self._starts[label] : self._starts[label + 1]]


def pick(rng: random.Random, options: Sequence[int] | Numbers) -> int:
    """Return one of the options."""
    return options[int(rng.random() * len(options))]


def draw_among(
    rng: random.Random,
    among: Sequence[int] | Numbers,
    accept: Callable[[int], bool],
    count: int,
    taken: Iterable[int] = (),
    look_at_all: bool = True,
) -> list[int]:
    """Return up to ``count`` different accepted options that are not ``taken``, in random order.

    Guesses first, since nearly every option is accepted and there may be a million.

    Args:
        rng: the source of randomness.
        among: the options, without repeats.
        accept: says whether an option will do.
        count: how many are wanted.
        taken: options that are not wanted.
        look_at_all: look at every option when guessing does not find enough; else fewer are returned.
    """
    avoided = set(taken)
    chosen: list[int] = []
    if not among:
        return chosen
    for _ in range(_GUESSES * count):
        if len(chosen) == count:
            return chosen
        option = pick(rng, among)
        if option not in avoided and accept(option):
            avoided.add(option)
            chosen.append(option)
    if look_at_all and len(chosen) < count:
        left = [option for option in among if option not in avoided and accept(option)]
        chosen += rng.sample(left, min(count - len(chosen), len(left)))
    return chosen


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

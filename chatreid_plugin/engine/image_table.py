"""The training images of a recipe in columns, in one file that every worker process maps into its memory.

Columns instead of ImageRecords: a million images take some hundred megabytes once, not some gigabytes in each process.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from ..images import ImagePolicy, count_visual_tokens
from ..shards import open_atomically
from .arrow_compute import pc
from .draws import number


Codes = npt.NDArray[np.int64]


# English takes about 4.5 bytes a token and Chinese 3 or more; fewer here, so that a caption is not underestimated.
BYTES_PER_TOKEN = 3
_SOURCES = b"sources"
# A column that hard negatives by features add (``feature_files``): rows of the source, see ``look_alikes``.
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
        return _encode(self.get_column(name)[rows])

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
        return _encode(self.captions)

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
        names, values = _encode(self.attributes.field("name")), _encode(self.attributes.field("value"))
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


def _encode(column: pa.Array) -> Codes:
    return pc.fill_null(column.dictionary_encode().indices, -1).to_numpy().astype(np.int64)

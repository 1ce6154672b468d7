"""A gallery to search in: a folder, a list in CSV or a manifest, and its index on disk.

An image is known by a hash of its bytes: copies are one image with several paths, and what is renamed or moved is not
computed again. The index of one model and filter is a folder with three files that only grow: ``features.f32`` (a row
an image), ``vision.bin`` (what the model's vision tower makes of it) and ``images.jsonl``, whose lines say what of the
two belongs to whom. A line is written last, for a whole batch: a killed run is cut back to its last line, and goes on
with the batch that would have been next, so that the files have the same bytes in the end.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..archives import ScoreArray
from ..datasets.listing import IMAGE_SUFFIXES
from ..datasets.own_data import read_csv
from ..errors import DataError
from ..eval.backends.base import StoredFeature
from ..eval.scores import digest_fingerprint, hash_file
from ..locks import make_folder, open_locked
from ..pixels import open_crop
from ..printing import make_printable
from ..records import ImageRecord
from ..regular_files import leaves_root
from ..shards import read_manifest


THREADS = 8
EXAMPLES_SHOWN = 10
# Columns of a list; others are attributes.
COLUMNS = ("path", "camera", "time", "person", "caption")
LINES, FEATURES, VISION = "images.jsonl", "features.f32", "vision.bin"


@dataclass(frozen=True, slots=True)
class GalleryImage:
    """One picture, however many files have it.

    Attributes:
        record: its first file; ``image_id`` and ``content_hash`` are the hash of the bytes.
        paths: all files, below the gallery's root.
        time: when it was taken, if a list says so.
    """

    record: ImageRecord
    paths: tuple[str, ...]
    time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Gallery:
    """What is searched.

    Attributes:
        source: the folder, list or manifest.
        root: what paths are relative to.
        images: each content once, in the order of its first path.
        unreadable: path, to what is wrong with the file.
        places: content hash, to the place in ``images``.
    """

    source: Path
    root: Path
    images: Sequence[GalleryImage]
    unreadable: Mapping[str, str]
    places: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def records(self) -> list[ImageRecord]:
        """The records of all images."""
        return [image.record for image in self.images]


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source names, before a file is opened; records go by their path."""

    root: Path
    records: list[ImageRecord]
    times: Mapping[str, datetime] = field(default_factory=dict[str, datetime])


def list_gallery(source: Path) -> Listing:
    """Return what a folder, a ``.csv`` list or a manifest (``.parquet``) names.

    Raises:
        DataError: it is none of them, or a line or the manifest is damaged.
    """
    if source.is_dir():
        return Listing(source.resolve(), [_make_record(path) for path in _list_files(source)])
    if source.suffix == ".parquet":
        records, root = read_manifest(source)
        ranked = [record for record in records if record.split == "gallery"] or records
        return Listing(root, ranked)
    if source.suffix == ".csv":
        return _read_list(source)
    raise DataError(f"{source} is not a folder, a .csv list or a manifest (.parquet). Name the pictures to search.")


def _make_record(path: str) -> ImageRecord:
    return ImageRecord(path, "search", "gallery", path, "", "", 0, 0)


def _list_files(folder: Path) -> list[str]:
    """Return the image files below a folder, also through links, each folder once; hidden ones are left out."""
    files: list[str] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            own = [name for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
            files += [Path(parent, name).relative_to(folder).as_posix() for name in own]
        seen.add(real)
    return files


def _read_list(path: Path) -> Listing:
    """Read a list in CSV; paths are relative to its folder."""
    records, times = dict[str, ImageRecord](), dict[str, datetime]()
    for number, row in read_csv(path):
        where = f"{path}, line {number}"
        name = row["path"]
        if not name or leaves_root(name):
            raise DataError(f"{where}: the path {name!r} is not below {path.parent}.")
        given = {key: row.get(key, "") for key in COLUMNS[1:]}
        own = {key: value for key, value in row.items() if key not in COLUMNS and value}
        if given["time"]:
            times[name] = read_time(given["time"], where)
        captions = (given["caption"],) if given["caption"] else ()
        record = _make_record(name)
        labels = {"person_id": given["person"], "camera_id": given["camera"]}
        records[name] = replace(record, **labels, captions=captions, attributes=own)
    return Listing(path.parent.resolve(), list(records.values()), times)


def read_time(text: str, where: str) -> datetime:
    """Return a time in ISO 8601 as this machine's clock shows it, where it names a zone.

    Raises:
        DataError: it is none.
    """
    try:
        time = datetime.fromisoformat(text)
        return time if time.tzinfo is None else time.astimezone().replace(tzinfo=None)
    except (ValueError, OverflowError):
        raise DataError(f"{where}: {text!r} is not a time in ISO 8601, such as 2026-03-01T14:30.") from None


def read_gallery(source: Path, listing: Listing, sizes: Mapping[str, tuple[int, int]]) -> Gallery:
    """Hash all files of a listing, and decode those that no index knows.

    Args:
        source: what was listed.
        listing: of ``list_gallery``.
        sizes: content hash to width and height of what was decoded before.

    Raises:
        DataError: nothing can be read.
    """

    def look(record: ImageRecord) -> ImageRecord | str:
        if record.path != make_printable(record.path):
            return f"{make_printable(record.path)}: the name is not UTF-8, or cannot be shown. Rename the file."
        try:
            digest = hash_file(listing.root / record.path)
            size = sizes.get(digest) or open_crop(listing.root / record.path).size
        except DataError as error:
            return str(error)
        known = {"image_id": digest, "content_hash": digest, "width": size[0], "height": size[1]}
        return replace(record, **known)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(look, listing.records))
    images, unreadable = dict[str, GalleryImage](), dict[str, str]()
    for listed, one in zip(listing.records, found, strict=True):
        if isinstance(one, str):
            unreadable[make_printable(listed.path)] = one
        elif one.image_id in images:
            first = images[one.image_id]
            images[one.image_id] = replace(first, paths=(*first.paths, one.path))
        else:
            images[one.image_id] = GalleryImage(one, (one.path,), listing.times.get(one.path))
    if not images:
        reasons = "".join(f"\n  {reason}" for reason in list(unreadable.values())[:EXAMPLES_SHOWN])
        raise DataError(f"{source} has no image that can be read ({', '.join(IMAGE_SUFFIXES)}).{reasons}")
    places = {name: place for place, name in enumerate(images)}
    return Gallery(source, listing.root, list(images.values()), unreadable, places)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where an image stands in the files of an index."""

    row: int
    size: tuple[int, int]
    grid: tuple[int, int, int] | None = None
    shape: tuple[int, ...] = ()
    start: int = 0
    length: int = 0


Progress = Callable[[int, int], None]  # done and all; may raise to stop
# A batch of images, with their features (N, D) and, of a model that runs here, what its vision tower makes of each.
Batch = tuple[Sequence[ImageRecord], ScoreArray, Sequence[StoredFeature] | None]


class Index:
    """What is computed of a gallery's images, by content hash.

    Attributes:
        folder: its files; see the module.
    """

    def __init__(self, parent: Path, made_by: Mapping[str, Any]) -> None:
        """Open the index that one filter and model have made, or will make.

        Args:
            parent: folder of all indices of a gallery.
            made_by: all that its bytes depend on besides the images; JSON values.

        Raises:
            ConfigError: the folder cannot be made.
            DataError: a line is damaged.
        """
        self._header = json.dumps(dict(made_by), sort_keys=True)
        self.folder = parent / digest_fingerprint(made_by)
        make_folder(self.folder, "--index")
        self._entries: dict[str, _Entry] = {}
        self._width, self._vision_end, self._usable = 0, 0, 0
        self._load()

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._entries

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Content hash to width and height."""
        return {name: entry.size for name, entry in self._entries.items()}

    def _load(self) -> None:
        self._entries, self._vision_end = {}, 0
        path = self.folder / LINES
        content = path.read_bytes() if path.exists() else b""
        self._usable = content.rfind(b"\n") + 1
        for number, text in enumerate(content[: self._usable].split(b"\n")[:-1], 1):
            try:
                line = json.loads(text)
                if number > 1:
                    self._note(line)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise DataError(f"{path}, line {number}: damaged ({error}). Remove {self.folder}.") from None

    def _note(self, line: Mapping[str, Any]) -> None:
        """Take note of a batch."""
        self._width = int(line["width"])
        for image in line["images"]:
            entry = _Entry(len(self._entries), (int(image["size"][0]), int(image["size"][1])))
            if stored := image.get("vision"):
                grid, shape, length = tuple(stored["grid"]), tuple(stored["shape"]), int(stored["length"])
                entry = replace(entry, grid=grid, shape=shape, start=self._vision_end, length=length)
                self._vision_end += length
            self._entries[image["id"]] = entry

    def add(
        self,
        records: Sequence[ImageRecord],
        compute: Callable[[Sequence[ImageRecord]], Iterator[Batch]],
        progress: Progress,
    ) -> None:
        """Compute and write what the index lacks, batch by batch; each is on disk before the next one is computed.

        Args:
            records: images; those that are known are passed over.
            compute: yields batches, always the same ones of the same images.
            progress: is told how many new images are done, of how many, and may raise to stop.

        Raises:
            ConfigError: another process adds to this index.
            DataError: the disk is full.
        """
        done = 0
        try:
            with (
                open_locked(self.folder / LINES, "search", "--index") as lines,
                (self.folder / FEATURES).open("a+b") as features,
                (self.folder / VISION).open("a+b") as vision,
            ):
                self._load()  # another process may have added some before this one had the lock
                new = [record for record in records if record.image_id not in self._entries]
                lines.truncate(self._usable)
                features.truncate(len(self._entries) * self._width * 4)
                vision.truncate(self._vision_end)
                if not self._usable:
                    _write(lines, self._header.encode() + b"\n")
                for batch, rows, stored in compute(new):
                    line = _describe_batch(batch, rows, stored)
                    for file, content in (
                        (vision, b"".join(one.content for one in stored or ())),
                        (features, rows.astype("<f4").tobytes()),
                        (lines, json.dumps(line).encode() + b"\n"),
                    ):
                        _write(file, content)
                    self._note(line)
                    done += len(batch)
                    progress(done, len(new))
        except OSError as error:
            raise DataError(f"The index {self.folder} cannot be written: {error}. Make room, then go on.") from None

    def take_features(self, image_ids: Iterable[str]) -> ScoreArray:
        """Return features (N, D) of images that are in the index."""
        rows = [self._entries[name].row for name in image_ids]
        shape = len(self._entries), self._width
        return np.memmap(self.folder / FEATURES, dtype="<f4", mode="r", shape=shape)[rows]

    def read_vision(self, image_id: str) -> StoredFeature | None:
        """Return what the vision tower made of an image; None if it is not in the index, or no model made it."""
        entry = self._entries.get(image_id)
        if entry is None or entry.grid is None:
            return None
        with (self.folder / VISION).open("rb") as file:
            file.seek(entry.start)
            return StoredFeature(entry.grid, entry.shape, file.read(entry.length))


def _write(file: IO[bytes], content: bytes) -> None:
    left = memoryview(content)
    while left:  # an unbuffered file may take a part
        left = left[file.write(left) :]
    file.flush()


def _describe_batch(
    records: Sequence[ImageRecord], rows: ScoreArray, stored: Sequence[StoredFeature] | None
) -> dict[str, Any]:
    images: list[dict[str, Any]] = [
        {"id": record.image_id, "size": [record.width, record.height]} for record in records
    ]
    for image, one in zip(images, stored or (), strict=False):
        image["vision"] = {"grid": one.grid, "shape": one.shape, "length": len(one.content)}
    return {"width": rows.shape[1], "images": images}

"""Who looks like whom: for each image the most similar images of other people, camera by camera.

Evaluation asks about the gallery images that look most like the query (paper section 4.1); with
``gallery.hard_negatives.from: FILE.npz`` training is asked about such, too. They are found once for a build, by a file
of features for each source, and stand in the image table's file, so that every worker maps the same numbers.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from tqdm import tqdm

from ..archives import Array, normalise, read_features
from ..config import COLOUR, BuildSettings
from ..errors import DataError
from ..shards import digest_file
from .manifests import find_manifest
from .pool import LOOK_ALIKES, Codes, ImageTable, Numbers, SourceRows, number, view


if TYPE_CHECKING:
    from .sampler import ImagePool


Nearest = npt.NDArray[np.int32]

# How many look-alikes each image has in a camera: a hard negative is one of them, each as likely. Evaluation asks
# about 100 of Market-1501's gallery of 15,913, one of 160; a sixth of its 12,936 training images is a camera's, and
# one of 160 of those is 13. Far fewer would be one person's alone: the same person, where the labels have two names.
NEAREST = 10
# Directions are vectors of whole numbers no longer than this: products of two of them, and every sum on the way, are
# then whole numbers up to 2**24, which float32 holds exactly. So the same images are found whatever library, number of
# threads or processor multiplies. It costs 1e-4 of a cosine.
_LENGTH = 4096.0
_ROUNDED_AT_ONCE = 4096
_COMPARED_AT_ONCE = 1 << 22
_NEVER = -(1 << 62)

# Stage 1 shows one image a record, and no negatives.
STAGES_WITH_NEGATIVES = frozenset((2, 3))


class Appearances:
    """In which groups (cameras, of one modality) each person is seen, and the row of each image's look-alikes in them.

    A negative stands in the camera of a match, so an image needs look-alikes only in the groups that its own person is
    seen in; whoever has one image has no match, and needs none.

    Attributes:
        row_starts: where each image's rows begin; one longer than the images.
    """

    def __init__(self, people: Codes, groups: Codes) -> None:
        """Index the images.

        Args:
            people: a number for each image, equal where the person is.
            groups: likewise of the group.
        """
        self.people, most = number(people), int(groups.max(initial=0)) + 1
        pairs = np.unique(self.people * most + groups)
        count = int(self.people.max(initial=-1)) + 1
        self.group_starts, self.seen_in = np.searchsorted(pairs // most, np.arange(count + 1)), pairs % most
        rows = np.where(np.bincount(self.people) > 1, np.diff(self.group_starts), 0)[self.people]
        self.row_starts = np.concatenate([[0], np.cumsum(rows)])

    def list_rows(self) -> tuple[Codes, Codes]:
        """Return the image and the group of each row."""
        images = np.repeat(np.arange(len(self.people)), np.diff(self.row_starts))
        places = np.arange(len(images)) - self.row_starts[images]
        return images, self.seen_in[self.group_starts[self.people[images]] + places]


class LookAlikes:
    """The look-alikes of the images of one source, as they are drawn from."""

    def __init__(self, appearances: Appearances, nearest: Nearest) -> None:
        """Take what ``find_nearest`` returned, mapped or not; it is not copied."""
        self._people, self._group_starts = view(appearances.people), view(appearances.group_starts)
        self._seen_in, self._row_starts = view(appearances.seen_in), view(appearances.row_starts)
        self._nearest = nearest.data

    def list_alike(self, image: int, group: int) -> Numbers:
        """Return the images of other people in a group that its person is seen in, most similar first."""
        person = self._people[image]
        first, last = self._group_starts[person], self._group_starts[person + 1]
        row = self._row_starts[image] + bisect_left(self._seen_in, group, first, last) - first
        found = self._nearest[row * NEAREST : (row + 1) * NEAREST]
        # -1 stands where a group shows fewer.
        return found[: next((place for place, other in enumerate(found) if other < 0), NEAREST)]


def find_nearest(appearances: Appearances, groups: Codes, features: Array, name: str) -> Nearest:
    """Return the ``NEAREST`` most similar images of other people for each row, one after another, -1 where fewer are.

    Of equal similarities the first images are taken.

    Args:
        appearances: of the images.
        groups: a number for each image, equal where the group is.
        features: a vector of each image (N, D), not zero.
        name: of the source, for the progress bar.
    """
    directions = _round_directions(features)
    images, asked = appearances.list_rows()
    nearest = np.full((len(images), NEAREST), -1, dtype=np.int32)
    with tqdm(total=len(images), desc=f"look-alikes of {name}", unit="image", unit_scale=True) as progress:
        for members, rows in _list_products(groups, asked):
            chosen, strangers = images[rows], appearances.people[members]
            # Exact whole numbers, so that each is made a key of its own: similarity first, then the earlier image.
            keys = (directions[chosen] @ directions[members].T).astype(np.int64)
            keys = keys * len(members) - np.arange(len(members))
            keys[appearances.people[chosen][:, None] == strangers] = _NEVER
            count = min(NEAREST, len(members))
            best = np.argpartition(keys, -count, axis=1)[:, -count:]
            values = np.take_along_axis(keys, best, axis=1)
            order = np.argsort(-values, axis=1, kind="stable")
            best, values = np.take_along_axis(best, order, axis=1), np.take_along_axis(values, order, axis=1)
            nearest[rows, :count] = np.where(values > _NEVER, members[best], -1)
            progress.update(len(rows))
    return nearest.ravel()


def _round_directions(features: Array) -> npt.NDArray[np.float32]:
    """Return vectors of whole numbers in the features' directions, none longer than ``_LENGTH``."""
    directions = np.empty(features.shape, dtype=np.float32)
    # Rounding adds up to half of each number's side; one more for what normalising leaves.
    length = np.float32(_LENGTH - np.sqrt(features.shape[1]) / 2 - 1)
    for first in range(0, len(features), _ROUNDED_AT_ONCE):
        part = slice(first, first + _ROUNDED_AT_ONCE)
        directions[part] = np.rint(normalise(features[part]) * length)
    return directions


def _list_products(groups: Codes, asked: Codes) -> Iterator[tuple[Codes, Codes]]:
    """Yield images of a group and rows that ask for it, so few at a time that their products take little memory."""
    by_group, by_question = np.argsort(groups, kind="stable"), np.argsort(asked, kind="stable")
    wanted = np.unique(asked)
    members = [np.searchsorted(groups[by_group], wanted, side) for side in ("left", "right")]
    rows = [np.searchsorted(asked[by_question], wanted, side) for side in ("left", "right")]
    for first, last, start, end in zip(*members, *rows, strict=True):
        step = max(1, _COMPARED_AT_ONCE // (last - first))
        for place in range(start, end, step):
            yield by_group[first:last], by_question[place : min(place + step, end)]


# ---- The files of features, one for each source ----


@dataclass(frozen=True, slots=True)
class FeatureFile:
    """The features of a source's images.

    Attributes:
        path: an .npz as ``chatreid embed`` writes it.
        digest: of its bytes.
        folder: what the paths of the image table begin with and those of the file, and of the manifest, do not.
    """

    path: Path
    digest: str
    folder: Path


def find_feature_files(settings: BuildSettings, folders: Mapping[str, Path]) -> dict[str, FeatureFile]:
    """Return the file of each source that has negatives to draw; none where colours or nothing say who looks alike.

    Args:
        settings: the recipe.
        folders: of each source, below the folder that all share.

    Raises:
        DataError: a file is missing.
    """
    hard = settings.gallery.hard_negatives
    stages = STAGES_WITH_NEGATIVES & {int(name.removeprefix("stage")) for name in settings.records}
    if hard.looks == COLOUR or hard.share == 0 or not stages:
        return {}
    names = [source.name for source in settings.sources if stages.intersection(source.stages)]
    paths = {name: Path(hard.looks.replace("{source}", name)) for name in names}
    for name, path in paths.items():
        if not path.is_file():
            raise DataError(
                f"gallery.hard_negatives.from: {path} does not exist. Write it with `chatreid embed CHECKPOINT "
                f"{find_manifest(settings, name)} {path} --split train`."
            )
    return {name: FeatureFile(path, digest_file(path), folders[name]) for name, path in paths.items()}


def combine_digests(images_digest: str, files: Mapping[str, FeatureFile]) -> str:
    """Return what names the images together with who looks like whom."""
    known = (images_digest, [(name, file.digest) for name, file in files.items()])
    return xxhash.xxh3_128_hexdigest(repr(known).encode()) if files else images_digest


def _read_features(file: FeatureFile, table: ImageTable, rows: SourceRows) -> Array:
    paths: list[str] = table.get_column("path")[rows.first : rows.last].to_pylist()
    own = [Path(path).relative_to(file.folder).as_posix() for path in paths]
    return read_features(file.path, [(f"training images of {rows.name}", [(path,) for path in own])])[0]


def check_feature_files(files: Mapping[str, FeatureFile], table: ImageTable) -> None:
    """Refuse files that do not have usable features of every image, before anything is built.

    Raises:
        DataError: naming the file and the images that it lacks.
    """
    for rows in table.sources:
        if rows.name in files:
            _read_features(files[rows.name], table, rows)


def add_look_alikes(files: Mapping[str, FeatureFile], table: ImageTable, pools: Sequence["ImagePool"]) -> pa.Table:
    """Return the table with a column of each image's look-alikes; the features of one source are in memory at a time.

    Args:
        files: of ``find_feature_files``; without any, the table is as it was.
        table: the images.
        pools: one for each source of the table.
    """
    if not files:
        return table.table
    found: list[Nearest | None] = []
    for rows, pool in zip(table.sources, pools, strict=True):
        file = files.get(rows.name)
        found.append(pool.find_look_alikes(_read_features(file, table, rows)) if file else None)
    return append_look_alikes(table, pools, found)


def append_look_alikes(table: ImageTable, pools: Sequence["ImagePool"], found: Sequence[Nearest | None]) -> pa.Table:
    """Return the table with what ``find_nearest`` found for each source as a column; None: nothing."""
    counts, values = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.int32)]
    for pool, nearest in zip(pools, found, strict=True):
        rows = np.diff(pool.appearances.row_starts)
        counts.append(rows * NEAREST if nearest is not None else np.zeros_like(rows))
        values += [nearest] if nearest is not None else []
    offsets = np.cumsum(np.concatenate(counts))
    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values)))
    return table.table.append_column(LOOK_ALIKES, column)

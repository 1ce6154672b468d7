"""The files of features that hard negatives are found by (``gallery.hard_negatives.from``), one for each source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from ..archives import Array, read_features
from ..config import COLOUR, BuildSettings
from ..errors import DataError
from ..shards import digest_file
from .look_alikes import NEAREST, Nearest
from .manifests import find_manifest
from .pool import LOOK_ALIKES, ImageTable, SourceRows
from .sampler import ImagePool


# Stage 1 shows one image a record, and no negatives.
STAGES_WITH_NEGATIVES = frozenset((2, 3))


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
    if not files:
        return images_digest
    known = (images_digest, [(name, file.digest) for name, file in files.items()])
    return xxhash.xxh3_128_hexdigest(repr(known).encode())


def _read(file: FeatureFile, table: ImageTable, rows: SourceRows) -> Array:
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
            _read(files[rows.name], table, rows)


def add_look_alikes(files: Mapping[str, FeatureFile], table: ImageTable, pools: Sequence[ImagePool]) -> pa.Table:
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
        found.append(pool.find_look_alikes(_read(file, table, rows)) if file else None)
    return append_look_alikes(table, pools, found)


def append_look_alikes(table: ImageTable, pools: Sequence[ImagePool], found: Sequence[Nearest | None]) -> pa.Table:
    """Return the table with what ``find_nearest`` found for each source as a column; None: nothing."""
    counts, values = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.int32)]
    for pool, nearest in zip(pools, found, strict=True):
        rows = np.diff(pool.appearances.row_starts)
        counts.append(rows * NEAREST if nearest is not None else np.zeros_like(rows))
        values += [nearest] if nearest is not None else []
    offsets = np.cumsum(np.concatenate(counts))
    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values)))
    return table.table.append_column(LOOK_ALIKES, column)

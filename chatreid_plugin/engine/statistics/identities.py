"""Images, cameras and positives of each identity, from the manifests that the data sets were built from."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ...config import BuildSettings
from ...errors import DataError
from ...shards import open_parquet
from ..arrow_compute import pc
from ..sources import find_manifest
from .counts import IntArray


COLUMNS = ["split", "person_id", "camera_id"]


@dataclass(frozen=True, slots=True)
class IdentityStatistics:
    """The training identities of one source.

    Attributes:
        images: number of training images.
        identities: number of people.
        cameras: number of cameras.
        images_per_identity: number of images -> identities that have so many.
        cameras_per_identity: number of cameras -> identities seen by so many.
        positives_per_image: images of the same identity from other cameras -> images that have so many.
    """

    images: int
    identities: int
    cameras: int
    images_per_identity: dict[int, int]
    cameras_per_identity: dict[int, int]
    positives_per_image: dict[int, int]


def measure_identities(recipes: Iterable[BuildSettings]) -> tuple[dict[str, IdentityStatistics], dict[str, str]]:
    """Return the statistics of every source that trains, and for those without a manifest the reason.

    Raises:
        DataError: a manifest is damaged.
    """
    found: dict[str, IdentityStatistics] = {}
    missing: dict[str, str] = {}
    for settings in recipes:
        for source in settings.sources:
            if not source.stages or source.name in found:
                continue
            path = find_manifest(settings, source.name)
            training = _read_training_images(path) if path.is_file() else None
            if training is None:
                missing[source.name] = f"no manifest {path}; run this where `chatreid build` ran"
            elif len(training) == 0:
                missing[source.name] = f"no training images in {path}"
            else:
                found[source.name] = _measure_identities(training)
    return found, missing


def _read_training_images(path: Path) -> pa.Table:
    """Return identity and camera of the training images; captions and hashes stay unread."""
    advice = "Make it again with `chatreid parse`."
    with open_parquet(path, advice) as file:
        table = file.read(columns=COLUMNS)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(f"{path} is not a manifest: it lacks {', '.join(missing)}. {advice}")
    return table.filter(pc.equal(table["split"], "train"))


def _measure_identities(training: pa.Table) -> IdentityStatistics:
    # One row for each identity and camera: from it follow the cameras, the images, and who has positives elsewhere.
    seen = training.group_by(["person_id", "camera_id"]).aggregate([("split", "count")])
    people = np.unique(seen["person_id"].to_numpy(), return_inverse=True)[1]
    taken = seen["split_count"].to_numpy().astype(np.int64)
    images = np.bincount(people, weights=taken).astype(np.int64)
    return IdentityStatistics(
        images=len(training),
        identities=len(images),
        cameras=len(pc.unique(training["camera_id"])),
        images_per_identity=_count_values(images),
        cameras_per_identity=_count_values(np.bincount(people)),
        positives_per_image=_count_values(np.repeat(images[people] - taken, taken)),
    )


def _count_values(values: IntArray) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))

"""The model's own image features of a whole manifest in one file (``chatreid embed``), for filters and trackers.

An .npz with ``paths`` (N,) and ``features`` (N, width) float32: for each image the mean of what the vision encoder and
its merger hand to the decoder, not normalised. ``filter: npz`` and ``backend: features`` read it.

Batch after batch is appended to a file beside the target, so that a killed run goes on where it stopped.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
from tqdm import tqdm

from ..archives import ScoreArray
from ..config import check_settings
from ..errors import ConfigError, DataError
from ..records import ImageRecord
from ..shards import open_atomically, read_manifest
from .backends.files import write_rows
from .backends.transformers import TransformersScorer
from .loader import check_images
from .scores import hash_images
from .settings import ModelOnly, ModelSettings


@dataclass(frozen=True, slots=True)
class Embedding:
    """What was written: ``images`` features of ``width`` numbers each, ``kept`` of them from a run before."""

    path: Path
    images: int
    width: int
    kept: int

    def render(self) -> str:
        """Return it in a line."""
        before = f" ({self.kept:,} were there from a run before)" if self.kept else ""
        return f"{self.path}: features of {self.images:,} images, {self.width} numbers each{before}"


def embed_manifest(
    checkpoint: str,
    manifest: Path,
    target: Path,
    overrides: Sequence[str] = (),
    stage: int = 3,
    splits: Sequence[str] = (),
    image_root: Path | None = None,
) -> Embedding:
    """Write the features of a manifest's images into ``target``, in the manifest's order.

    Args:
        checkpoint: folder or hub name.
        manifest: of ``chatreid parse``.
        target: the .npz.
        overrides: keys of the section ``model`` of eval/*.yaml, ``model.dtype=bfloat16``.
        stage: whose image policy applies; 0 for none.
        splits: the manifest's splits to take; all if empty.
        image_root: where the images are; None: where the manifest says.

    Raises:
        ConfigError: ``target`` is no .npz or another run writes it, or the checkpoint cannot be loaded.
        DataError: there are no images, or one cannot be read.
    """
    if target.suffix != ".npz":
        raise ConfigError(f"{target}: features are written into an .npz file; name one.")
    values = {"model": {"model_name_or_path": checkpoint, "chatreid_stage": stage or None}}
    settings = check_settings(values, overrides, ModelOnly, "chatreid embed").model
    records, root = read_manifest(manifest)
    found = sorted({record.split for record in records})
    records = [record for record in records if not splits or record.split in splits]
    if not records:
        raise DataError(f"{manifest} has no images of split {', '.join(splits)}; it has {', '.join(found) or 'none'}.")
    root = (image_root or root).resolve()
    check_images(records, root)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with part.open("a+b") as file:
        lock(file, target)
        scorer = TransformersScorer(settings, root)
        batches = scorer.features.form_batches(records)
        kept = _append_features(file, scorer, batches, _digest(settings, scorer, records, root))
        rows = _read_rows(file, part, len(records))
        places = {record.image_id: row for row, record in enumerate(r for batch in batches for r in batch)}
        _write(target, records, (rows[places[record.image_id]] for record in records), rows.shape[1])
        part.unlink()
    return Embedding(target, len(records), rows.shape[1], kept)


def _append_features(
    file: IO[bytes], scorer: TransformersScorer, batches: Sequence[Sequence[ImageRecord]], digest: str
) -> int:
    """Compute the batches that the file has not yet, behind a line that says whose they are; return what it had."""
    width, done = _resume(file, digest, batches)
    kept = sum(map(len, batches[:done]))
    with tqdm(total=sum(map(len, batches)), initial=kept, desc="features", unit="image") as progress:
        for batch, features in scorer.stream_pooled(batches[done:]):
            if not width:
                width = features.shape[1]
                file.write(json.dumps({"digest": digest, "width": width}).encode() + b"\n")
            file.write(features.astype("<f4").tobytes())
            file.flush()
            progress.update(len(batch))
    return kept


def _read_rows(file: IO[bytes], part: Path, count: int) -> ScoreArray:
    """Return the file's features (N, width), mapped."""
    file.seek(0)
    line = file.readline()
    return np.memmap(part, dtype="<f4", mode="r", offset=len(line), shape=(count, json.loads(line)["width"]))


def lock(file: IO[bytes], target: Path) -> None:
    """Keep the file for this process until it is closed, or refuse because another one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"{target}: another run is writing it. Wait for it or stop it, or name another.") from None


def _digest(settings: ModelSettings, scorer: TransformersScorer, records: Sequence[ImageRecord], root: Path) -> str:
    """Return what tells a run that can go on from others: model, image policy, precision, and the images' bytes."""
    policy = settings.policy
    known = {
        **{key: scorer.fingerprint[key] for key in ("weights", "configuration")},
        "policy": [policy.stage, policy.aspect, policy.image_max_pixels, policy.image_min_pixels],
        "dtype": settings.dtype,
        "contents": hash_images(records, root),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _resume(file: IO[bytes], digest: str, batches: Sequence[Sequence[ImageRecord]]) -> tuple[int, int]:
    """Return the width and how many whole batches an earlier run has left, (0, 0) of none; drop what else is there."""
    file.seek(0)
    line, size = file.readline(), file.seek(0, os.SEEK_END)
    try:
        header = json.loads(line)
        same = header["digest"] == digest
        bytes_each = 4 * int(header["width"])
    except (ValueError, KeyError, TypeError):
        same, bytes_each = False, 0
    if not same or not bytes_each:
        file.truncate(0)
        return 0, 0
    ends = np.cumsum([len(batch) for batch in batches])
    done = int(np.searchsorted(ends, (size - len(line)) // bytes_each, side="right"))
    file.truncate(len(line) + bytes_each * (int(ends[done - 1]) if done else 0))
    return bytes_each // 4, done


def _write(target: Path, records: Sequence[ImageRecord], rows: Iterable[ScoreArray], width: int) -> None:
    """Write the .npz, row by row."""
    with open_atomically(target) as temporary, ZipFile(temporary, "w", ZIP_STORED) as archive:
        # A fixed date, so that equal features are equal bytes; numpy.savez would need them in memory.
        with archive.open(ZipInfo("features.npy"), "w", force_zip64=True) as member:
            write_rows(member, rows, (len(records), width))
        with archive.open(ZipInfo("paths.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array(member, np.array([record.path for record in records]), allow_pickle=False)

"""All scores of an evaluation as one matrix in a file (``save_matrix``), which ``backend: scores`` reads again.

Arrays: ``scores`` (Q, G) float32 in the manifest's order, NaN where a pair was not scored; ``queries`` (Q,) and
``gallery`` (G,), their ids; ``not_scored``, which says that NaN means that. An .npz holds all of them, an .npy the
scores alone (so that they can be mapped), with the other arrays in the .npz of the same name.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np

from ..archives import Array
from ..datasets.benchmark import Benchmark
from ..errors import ConfigError
from ..shards import open_atomically
from .arrays import ScoreArray
from .candidates import Plan


def check_target(path: Path) -> None:
    """Refuse a file that cannot be written, before days of scoring.

    Raises:
        ConfigError: names the folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"save_matrix: the folder {path.parent} cannot be made: {error}. Set another.") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"save_matrix: {path} cannot be written. Set another file.")


def iterate_ranked_scores(plan: Plan, scores: list[list[ScoreArray]]) -> Iterator[ScoreArray]:
    """Yield the scores (G,) of each query as they are ranked, NaN where a pair was not scored; one row in memory.

    Args:
        plan: what was scored.
        scores: for each trial (K,) for each query, as ``plan.trial_candidates``; empty where a file has them.
    """
    if plan.matrix is not None:
        for row in plan.matrix.iterate_rows():
            yield row.astype(np.float32)
        return
    for query in range(len(plan.protocol.queries)):
        row = np.full(len(plan.protocol.gallery), np.nan, dtype=np.float32)
        # A pair that several trials rank has one score.
        for candidates, values in zip(plan.trial_candidates, scores, strict=True):
            row[candidates[query]] = values[query]
        yield row


def write_matrix(path: Path, protocol: Benchmark, rows: Iterable[ScoreArray]) -> None:
    """Write the scores (G,) of each query, one after another, and the names; whole files or none.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    queries, gallery = protocol.queries, protocol.gallery
    names: dict[str, Array] = {
        "queries": np.array([query.query_id for query in queries]),
        "gallery": np.array([record.image_id for record in gallery]),
        "not_scored": np.array([np.nan], dtype=np.float32),
    }
    shape = len(queries), len(gallery)
    with ExitStack() as stack:
        archive_file = stack.enter_context(open_atomically(path.with_suffix(".npz")))
        if path.suffix == ".npy":
            with stack.enter_context(open_atomically(path)).open("wb") as file:
                write_rows(file, rows, shape)
        with ZipFile(archive_file, "w", ZIP_STORED) as archive:
            if path.suffix == ".npz":
                # A fixed date, so that equal scores are equal bytes; numpy.savez would need the matrix in memory.
                with archive.open(ZipInfo("scores.npy"), "w", force_zip64=True) as member:
                    write_rows(member, rows, shape)
            for name, values in names.items():
                with archive.open(ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)


def write_rows(file: IO[bytes], rows: Iterable[ScoreArray], shape: tuple[int, int]) -> None:
    """Write rows of float32, one after another, as the .npy of one array."""
    header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for row in rows:
        file.write(row.astype("<f4").tobytes())

"""Scores on disk, one flushed line per finished query, so that a killed evaluation goes on where it stopped.

Between the scorer and the ranking. The first line says what the scores depend on (model, prompt, pixels, settings);
the file is named after its digest, so another model or prompt starts another file and never mixes with this one.
Of several processes each writes a file of its own, and any run reads what all of them left.
"""

import base64
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import DataError
from ..records import ImageRecord
from .queries import Query
from .ties import ScoreArray


logger = logging.getLogger(__name__)


def hash_candidates(query: Query, candidates: Sequence[ImageRecord]) -> str:
    """Return a digest of the query, its candidates and their order."""
    pictures = candidates if query.image is None else [query.image, *candidates]
    lines = [f"{record.image_id}\t{record.path}\t{record.width}x{record.height}" for record in pictures]
    lines += [query.query_id, query.text, json.dumps(dict(query.attributes), sort_keys=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def digest_fingerprint(fingerprint: Mapping[str, Any]) -> str:
    """Return a short digest of everything that changes scores."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


Finished = dict[str, tuple[str, ScoreArray]]


class ScoreStore:
    """The scores of one fingerprint, in ``<folder>/scores-<digest>.jsonl``; use it in a ``with`` block.

    Scores are stored as base64 of little-endian float32, so they are read back bit by bit. ``finished`` maps a
    query's id to a hash of its candidates and their scores (K,).

    Raises:
        DataError: a file was damaged otherwise than by a cut in its last line.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], *, overwrite: bool = False, rank: int = 0):
        """Open the file of this fingerprint and process, and load what any process has finished.

        ``overwrite`` removes all of it first; among several processes only the first may ask for that, before the
        others open theirs.
        """
        folder.mkdir(parents=True, exist_ok=True)
        digest = digest_fingerprint(fingerprint)
        self.path = folder / (f"scores-{digest}.rank{rank}.jsonl" if rank else f"scores-{digest}.jsonl")
        self.finished: Finished = {}
        self._own: dict[str, str] = {}
        self.header = json.dumps({"fingerprint": dict(fingerprint)}, sort_keys=True).encode() + b"\n"
        same = sorted(folder.glob(f"scores-{digest}.*jsonl"))
        others = sorted(path.name for path in folder.glob("scores-*.jsonl") if path not in same)
        if overwrite:
            for path in same:
                path.unlink()
            same = []
        elif others and not same and not rank:
            logger.warning(
                "%s holds scores of another model, prompt or setting (%s); they are kept, and this evaluation starts "
                "a new file, %s.",
                folder,
                ", ".join(others),
                self.path.name,
            )
        for path in same:
            if path != self.path:
                self._read(path)
        usable = self._read(self.path) if self.path.exists() else 0
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        self._file.truncate(usable)
        self._file.seek(usable)
        if not usable:
            self._write(self.header)

    def _read(self, path: Path) -> int:
        """Load a file's finished queries; return how many of its bytes are whole lines."""
        content = path.read_bytes()
        usable = content.rfind(b"\n") + 1
        if usable < len(content) and path == self.path:
            logger.warning("%s ends in a torn line; that query is scored again.", path)
        lines = content[:usable].splitlines(keepends=True)
        if not lines:
            return 0
        if lines[0] != self.header:
            raise DataError(f"{path}, line 1: not the header of these scores. Remove it or set overwrite=true.")
        for number, line in enumerate(lines[1:], 2):
            try:
                entry = json.loads(line)
                scores = np.frombuffer(base64.b64decode(entry["scores"], validate=True), dtype="<f4")
                self.finished[entry["query"]] = (entry["candidates"], scores.astype(np.float32))
                if path == self.path:
                    self._own[entry["query"]] = entry["candidates"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: damaged ({error}). Remove the line, or set overwrite=true to score "
                    "everything again."
                ) from None
        return usable

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def get(self, query: Query, candidates: Sequence[ImageRecord]) -> ScoreArray | None:
        """Return the saved scores (K,) of a query, or None if it is unfinished or had other candidates."""
        saved = self.finished.get(query.query_id)
        if saved is None or saved[0] != hash_candidates(query, candidates) or len(saved[1]) != len(candidates):
            return None
        return saved[1]

    def add(self, query: Query, candidates: Sequence[ImageRecord], scores: ScoreArray) -> None:
        """Save the scores (K,) of a finished query; they are on disk when this returns."""
        self._write_entry(query.query_id, hash_candidates(query, candidates), scores.astype(np.float32))

    def _write_entry(self, query_id: str, candidates: str, scores: ScoreArray) -> None:
        text = base64.b64encode(scores.astype("<f4").tobytes()).decode()
        self._write(json.dumps({"query": query_id, "candidates": candidates, "scores": text}).encode() + b"\n")
        self.finished[query_id] = (candidates, scores)
        self._own[query_id] = candidates

    def take_over(self) -> None:
        """Write what other processes finished into this file, then remove theirs."""
        for query, (candidates, scores) in sorted(self.finished.items()):
            if self._own.get(query) != candidates:
                self._write_entry(query, candidates, scores)
        for path in self.path.parent.glob(f"{self.path.stem}.rank*.jsonl"):
            path.unlink()

    def __enter__(self) -> "ScoreStore":
        """Return the store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; what was added is already on disk."""
        self._file.close()

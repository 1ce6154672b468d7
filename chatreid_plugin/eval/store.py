"""Scores on disk, one flushed line per finished query, so that a killed evaluation goes on where it stopped.

Between the scorer and the ranking. The first line says what the scores depend on (model, prompt, pixels, settings);
the file is named after its digest, so another model or prompt starts another file and never mixes with this one.
Of several processes each writes a file of its own, and any run reads what all of them left. The folder is locked as
long as an evaluation runs, and a file while it is open: a process may outlive the first one of its run. Scores of
other candidates stay: they may be the current ones again.
"""

import base64
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from ..errors import DataError
from ..locks import open_locked
from ..records import ImageRecord
from .arrays import ScoreArray
from .output_folder import explain_failures
from .queries import Query


logger = logging.getLogger(__name__)


def hash_candidates(query: Query, candidates: Sequence[ImageRecord], contents: Mapping[str, str]) -> str:
    """Return a digest of the query, its candidates, their order and what ``contents`` says of the images."""
    pictures = candidates if query.image is None else [query.image, *candidates]
    lines = [
        f"{record.image_id}\t{record.path}\t{record.width}x{record.height}\t{contents.get(record.image_id, '')}"
        for record in pictures
    ]
    lines += [query.query_id, query.text, json.dumps(dict(query.attributes), sort_keys=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def digest_fingerprint(fingerprint: Mapping[str, Any]) -> str:
    """Return a short digest of everything that changes scores."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


# A query's id and the hash of its candidates.
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Scored:
    """What is known of a finished query.

    Attributes:
        scores: (K,) float32, of its candidates.
        filled: whether something in them was filled in (``Scorer.filled``).
    """

    scores: ScoreArray
    filled: bool = False


Finished = dict[Key, Scored]


def read_header(line: bytes) -> dict[str, Any]:
    """Return what the first line of a file of scores says: ``fingerprint`` and ``names``; nothing if it is none."""
    try:
        header: Any = json.loads(line)
    except ValueError:
        return {}
    found = cast(dict[str, Any], header) if isinstance(header, dict) else {}
    return found if all(isinstance(found.get(key), dict) for key in ("fingerprint", "names")) else {}


def remove_scores(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Remove all scores of a fingerprint from a folder, whichever process wrote them; several may do so at once.

    Raises:
        DataError: a file cannot be removed.
    """
    for path in folder.glob(f"scores-{digest_fingerprint(fingerprint)}.*jsonl"):
        with explain_failures(path):
            path.unlink(missing_ok=True)


class ScoreStore:
    """The scores of one fingerprint, in ``<folder>/scores-<digest>.jsonl``; use it in a ``with`` block.

    Scores are stored as base64 of little-endian float32, so they are read back bit by bit; ``"filled": true``
    stands beside them where something was filled in. ``finished`` has what is known by a query's id and a hash of its
    candidates.

    Raises:
        ConfigError: another run has the file open, or it cannot be opened.
        DataError: a file was damaged otherwise than by a cut in its last line, or cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        *,
        contents: Mapping[str, str] | None = None,
        names: Mapping[str, str | None] | None = None,
        rank: int = 0,
    ):
        """Open the file of this fingerprint and process, and load what any process has finished.

        Args:
            folder: where the files are.
            fingerprint: what the scores depend on (``scoring.describe_fingerprint``).
            contents: of ``contents.hash_images``, where scores depend on pixels.
            names: what a new file says besides, without depending on it: what the model was called.
            rank: of this process.
        """
        digest = digest_fingerprint(fingerprint)
        self.path = folder / (f"scores-{digest}.rank{rank}.jsonl" if rank else f"scores-{digest}.jsonl")
        self.finished: Finished = {}
        self._contents = contents or {}
        self._own: set[Key] = set()
        self._fingerprint = dict(fingerprint)
        header = {"fingerprint": self._fingerprint, "names": dict(names or {})}
        self._header = json.dumps(header, sort_keys=True).encode() + b"\n"
        same = sorted(folder.glob(f"scores-{digest}.*jsonl"))
        others = sorted(path.name for path in folder.glob("scores-*.jsonl") if path not in same)
        self._file = open_locked(self.path, "evaluation")
        try:
            self._load([path for path in same if path.exists()])
            if others and not self.finished and not rank:
                logger.warning(
                    "%s holds scores of another model, prompt or setting (%s); they are kept, and this evaluation "
                    "starts a new file, %s.",
                    folder,
                    ", ".join(others),
                    self.path.name,
                )
        except BaseException:
            self._file.close()
            raise

    def _load(self, same: Sequence[Path]) -> None:
        """Read the files of this fingerprint; make the own one end in a whole line."""
        for path in same:
            if path != self.path:
                with explain_failures(path):
                    self._read(path)
        with explain_failures(self.path):
            usable = self._read(self.path)
            self._file.truncate(usable)
        if not usable:
            self._write(self._header)

    def _read(self, path: Path) -> int:
        """Load a file's finished queries; return how many of its bytes are whole lines."""
        content = path.read_bytes()
        usable = content.rfind(b"\n") + 1
        if usable < len(content) and path == self.path:
            logger.warning("%s ends in a torn line; that query is scored again.", path)
        lines = content[:usable].splitlines(keepends=True)
        if not lines:
            return 0
        if read_header(lines[0]).get("fingerprint") != self._fingerprint:
            raise DataError(f"{path}, line 1: not the header of these scores. Remove it or set overwrite=true.")
        for number, line in enumerate(lines[1:], 2):
            if not line.strip():
                continue  # as an editor leaves it
            try:
                entry = json.loads(line)
                scores = np.frombuffer(base64.b64decode(entry["scores"], validate=True), dtype="<f4")
                key = entry["query"], entry["candidates"]
                self.finished[key] = Scored(scores.astype(np.float32), entry.get("filled", False))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: damaged ({error}). Remove the line, or set overwrite=true to score "
                    "everything again."
                ) from None
            if path == self.path:
                self._own.add(key)
        return usable

    def _write(self, line: bytes) -> None:
        left = memoryview(line)
        with explain_failures(self.path):
            while left:
                left = left[os.write(self._file.fileno(), left) :]
            os.fsync(self._file.fileno())

    def make_key(self, query: Query, candidates: Sequence[ImageRecord]) -> Key:
        """Return what the scores of a query's candidates are found by."""
        return query.query_id, hash_candidates(query, candidates, self._contents)

    def get(self, key: Key, count: int) -> Scored | None:
        """Return what is saved of ``count`` candidates, or None if the query is unfinished or had others."""
        saved = self.finished.get(key)
        return saved if saved is not None and len(saved.scores) == count else None

    def add(self, key: Key, scored: Scored) -> None:
        """Save a finished query; it is on disk when this returns."""
        scores = scored.scores.astype(np.float32)
        entry: dict[str, Any] = {"query": key[0], "candidates": key[1]}
        entry["scores"] = base64.b64encode(scores.astype("<f4").tobytes()).decode()
        if scored.filled:
            entry["filled"] = True
        self._write(json.dumps(entry).encode() + b"\n")
        self.finished[key] = Scored(scores, scored.filled)
        self._own.add(key)

    def take_over(self) -> None:
        """Write what other processes finished into this file, then remove theirs."""
        for key, scored in sorted(self.finished.items(), key=lambda item: item[0]):
            if key not in self._own:
                self.add(key, scored)
        for path in self.path.parent.glob(f"{self.path.stem}.rank*.jsonl"):
            with explain_failures(path):
                path.unlink(missing_ok=True)

    def __enter__(self) -> "ScoreStore":
        """Return the store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; what was added is already on disk."""
        self._file.close()

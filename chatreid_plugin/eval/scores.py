"""Scores on disk, one flushed line per finished query, so that a killed evaluation goes on where it stopped.

The first line of a file says what its scores depend on (model, prompt, pixels, settings), and the file is named after
a digest of it: another model or prompt starts another file and never mixes with this one. Of several processes each
writes a file of its own, and any run reads what all of them left. The folder is locked as long as an evaluation runs,
and a file while it is open: a process may outlive the first one of its run. Scores of other candidates stay: they may
be the current ones again.

``saved_scores: true`` ranks them without the model that gave them: what of the first line the settings decide has to
be as it is now; weights and the like are taken as they stand there. The features by which the model itself filtered
(``filter: vlm``) are kept beside the scores, in ``filter.npz``.
"""

import base64
import hashlib
import json
import logging
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import xxhash

from ..archives import ScoreArray, open_archive
from ..datasets.benchmark import Benchmark, Query
from ..errors import ConfigError, DataError
from ..locks import open_locked
from ..records import ImageRecord
from ..shards import open_atomically
from .backends.base import Confidence
from .backends.files import ModelFreeScorer
from .calibration import Calibration
from .distributed import Processes
from .settings import EvalSettings


logger = logging.getLogger(__name__)
THREADS = 8
FILES_A_JOB = 256
SHOWN = 60
FILTER_FILE = "filter.npz"

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


def digest_fingerprint(fingerprint: Mapping[str, Any]) -> str:
    """Return a short digest of everything that changes scores."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


def hash_candidates(query: Query, candidates: Sequence[ImageRecord], contents: Mapping[str, str]) -> str:
    """Return a digest of the query, its candidates, their order and what ``contents`` says of the images."""
    pictures = candidates if query.image is None else [query.image, *candidates]
    lines = [
        f"{record.image_id}\t{record.path}\t{record.width}x{record.height}\t{contents.get(record.image_id, '')}"
        for record in pictures
    ]
    lines += [query.query_id, query.text, json.dumps(dict(query.attributes), sort_keys=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def hash_images(
    records: Sequence[ImageRecord], image_root: Path, processes: Processes | None = None
) -> dict[str, str]:
    """Return image id to a hash of the file's bytes, so that other pixels under the same name are not taken for them.

    The bytes count and not the date, so that images may be copied or moved; 100,000 crops of 8 kB take 1.3 s from the
    disk cache, and whatever is scored is read anyway. A manifest's own hashes are of the day when it was made. Several
    processes share the work.

    Raises:
        DataError: a file cannot be read.
    """
    processes = processes or Processes()
    share = processes.take_share(records)

    def hash_some(start: int) -> dict[str, str]:
        return {r.image_id: hash_file(image_root / r.path) for r in share[start : start + FILES_A_JOB]}

    own: dict[str, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(hash_some, range(0, len(share), FILES_A_JOB)):
            own |= part
    return {image_id: digest for part in processes.gather(own) for image_id, digest in part.items()}


def hash_bytes(content: bytes) -> str:
    """Return the hash by which ``hash_file`` knows a file of these bytes."""
    return xxhash.xxh3_64_hexdigest(content)


def hash_file(path: Path) -> str:
    """Return a hash of a file's bytes, by which an image is known wherever it lies.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return hash_bytes(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None


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
            contents: of ``hash_images``, where scores depend on pixels.
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


@contextmanager
def explain_failures(path: Path) -> Generator[None, None, None]:
    """Raise DataError, with what to do, for whatever the disk refuses."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"The scores in {path} cannot be read or kept: {error}. Make room on the disk of output_dir or check the "
            "permissions, then run the same command again: it goes on with the queries that are not finished."
        ) from None


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


class SavedScorer(ModelFreeScorer):
    """Stands in for a scorer whose scores are all saved; it is never asked for more (``scoring.score_queries``)."""

    def __init__(self, fingerprint: Mapping[str, Any]) -> None:
        """Take the place of the scorer with this fingerprint; that of a whole file will do."""
        self.fingerprint = fingerprint
        self.confidence: Confidence = "answers" if fingerprint.get("gives") == "answers" else "margins"


def name_model(settings: EvalSettings) -> dict[str, str | None]:
    """Return what the model is called, for the first line of a file of scores; a server tells its model itself."""
    if settings.scoring.backend != "transformers":
        return {}
    return settings.model.model_dump(include={"model_name_or_path", "adapter_name_or_path"})


def find_saved(settings: EvalSettings, questions: Mapping[str, Any]) -> SavedScorer:
    """Return the scorer of the one file of ``output_dir`` whose scores these settings ask for.

    Args:
        settings: the evaluation.
        questions: what of the fingerprint the settings decide (``scoring.describe_questions``).

    Raises:
        ConfigError: no file has them, or several; the message says in what the files differ.
    """
    folder = settings.output.output_dir
    # Files of several processes begin alike.
    found = {path.name.partition(".")[0]: _read_first(path) for path in sorted(folder.glob("scores-*.jsonl"))}
    if not found:
        raise ConfigError(
            f"scoring.saved_scores: {folder} has no scores-*.jsonl. Set output.output_dir, or evaluate with the model."
        )
    differences = {name: _list_differences(settings, questions, header) for name, header in found.items()}
    fitting = {name: found[name]["fingerprint"] for name, differing in differences.items() if not differing}
    if not fitting:
        lines = [f"  {name}.jsonl: {'; '.join(differing)}" for name, differing in differences.items()]
        raise ConfigError(
            f"scoring.saved_scores: no file in {folder} has scores of these settings.\n"
            + "\n".join(lines)
            + "\nSet these keys as they were and use that version of chatreid_plugin, or evaluate with the model "
            "(scoring.saved_scores=false)."
        )
    if len(fitting) > 1:
        raise ConfigError(
            f"scoring.saved_scores: several files in {folder} have scores of these settings.\n"
            + "\n".join(_tell_apart(fitting))
            + "\nMove all but one of them into another folder."
        )
    return SavedScorer(next(iter(fitting.values())))


def _read_first(path: Path) -> dict[str, Any]:
    """Return what a file's scores depend on and what the model was called; nothing where the first line is none."""
    try:
        with path.open("rb") as lines:
            return read_header(lines.readline())
    except OSError as error:
        raise ConfigError(f"scoring.saved_scores: {path} cannot be read: {error}.") from None


def _list_differences(settings: EvalSettings, questions: Mapping[str, Any], header: Mapping[str, Any]) -> list[str]:
    """Return in words in what saved scores are others than the settings ask for."""
    if not header:
        return ["its first line does not say what its scores depend on"]
    known: dict[str, Any] = {**header["fingerprint"], **header["names"]}
    # What the scorer tells of its settings; a server's only model need not be named, a checkpoint has a system prompt.
    sections = settings.model.model_dump(mode="json"), settings.server.model_dump(mode="json")
    told: dict[str, Any] = {key: value for section in sections for key, value in section.items() if key in known}
    told |= {"image_order": settings.scoring.image_order} if "image_order" in known else {}
    own = {key: value for key, value in told.items() if value is not None or key == "adapter_name_or_path"}
    wanted: dict[str, Any] = json.loads(json.dumps({**own, **questions}))
    differing = [key for key, value in wanted.items() if known.get(key) != value]
    # Another mode has other keys: what is there says enough.
    shown = [key for key in differing if key in known] or differing
    return [f"{key} was {_shorten(known.get(key))}, is {_shorten(wanted[key])}" for key in shown]


def _tell_apart(fitting: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line a file with what not all of them have alike."""
    keys = sorted({key for fingerprint in fitting.values() for key in fingerprint})
    differing = [key for key in keys if len({json.dumps(one.get(key)) for one in fitting.values()}) > 1]
    return [
        f"  {name}.jsonl: {', '.join(f'{key} {_shorten(one.get(key))}' for key in differing)}"
        for name, one in fitting.items()
    ]


def _shorten(value: Any) -> str:
    """Return a value in one line; a name or a path in full, since it has to be typed."""
    text = json.dumps(value, ensure_ascii=False)
    return text if isinstance(value, str) or len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _describe_filter(settings: EvalSettings, benchmark: Benchmark, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the features of ``filter: vlm`` and their threshold depend on, but the images' bytes."""
    keys = {"chatreid_stage", "chatreid_aspect", "image_max_pixels", "image_min_pixels", "dtype"}
    automatic = {"filter.recall": settings.filter.recall, "data.seed": settings.data.seed}
    return {
        **{f"model.{key}": value for key, value in settings.model.model_dump(include=keys).items()},
        "filter.tau": settings.filter.tau,
        **(automatic if settings.filter.tau == "auto" else {}),
        **{key: fingerprint.get(key) for key in ("weights", "configuration")},
        "queries": [query.query_id for query in benchmark.queries],
        "gallery": [record.image_id for record in benchmark.gallery],
    }


def keep_features(
    settings: EvalSettings,
    benchmark: Benchmark,
    fingerprint: Mapping[str, Any],
    features: tuple[ScoreArray, ScoreArray],
    calibration: Calibration | None,
) -> None:
    """Write the features of ``filter: vlm`` into ``output_dir``, for ``find_features``.

    Args:
        settings: the evaluation.
        benchmark: whose queries and gallery they are of.
        fingerprint: the model's.
        features: (Q, D) and (G, D).
        calibration: the threshold, if it was found.
    """
    about = {
        "depends_on": _describe_filter(settings, benchmark, fingerprint),
        "calibration": None if calibration is None else asdict(calibration),
    }
    with open_atomically(settings.output.output_dir / FILTER_FILE) as temporary, temporary.open("wb") as file:
        np.savez(file, queries=features[0], gallery=features[1], about=np.array(json.dumps(about)))


def find_features(
    settings: EvalSettings, benchmark: Benchmark, fingerprint: Mapping[str, Any], processes: Processes
) -> tuple[tuple[ScoreArray, ScoreArray], Calibration | None]:
    """Return what ``keep_features`` wrote in the run whose scores are ranked again.

    Raises:
        DataError: there is no such file, or it is of another model or of other queries, images or settings.
    """
    found = [_read_features(settings, benchmark, fingerprint)] if processes.is_first else []
    return processes.gather(found)[0][0]


def _read_features(
    settings: EvalSettings, benchmark: Benchmark, fingerprint: Mapping[str, Any]
) -> tuple[tuple[ScoreArray, ScoreArray], Calibration | None]:
    path = settings.output.output_dir / FILTER_FILE
    if not path.exists():
        raise DataError(
            f"scoring.saved_scores: {path}, the features by which filter.source: vlm chose candidates, is missing. "
            "Copy it from the run's folder, or evaluate with the model (scoring.saved_scores=false)."
        )
    arrays = open_archive(path, ("queries", "gallery", "about"))
    about = json.loads(str(arrays["about"])) if len(arrays) == 3 else {}
    wanted = json.loads(json.dumps(_describe_filter(settings, benchmark, fingerprint)))
    known = about.get("depends_on", {})
    differing = [key for key, value in wanted.items() if known.get(key) != value]
    if differing:
        raise DataError(
            f"scoring.saved_scores: the features of filter.source: vlm in {path} are of another run: "
            f"{', '.join(differing)} differ. Set these keys as they were, or evaluate with the model "
            "(scoring.saved_scores=false)."
        )
    calibration = about["calibration"]
    return (arrays["queries"], arrays["gallery"]), None if calibration is None else Calibration(**calibration)

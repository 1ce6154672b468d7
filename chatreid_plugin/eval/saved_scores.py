"""Rank saved scores without the model that gave them (``saved_scores: true``): find them, stand in for it.

The first line of a file of scores says what they depend on (``store``). What of it the settings decide has to be as it
is now; weights and the like are taken as they stand there, so that neither a checkpoint nor a server is needed. The
features by which the model itself filtered (``filter: vlm``) are kept beside the scores, in ``filter.npz``.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..archives import open_archive
from ..errors import ConfigError, DataError
from ..eval_settings import EvalSettings
from ..shards import open_atomically
from .arrays import ScoreArray
from .backends import Confidence
from .backends.simple import ModelFreeScorer
from .calibration import Calibration
from .distributed import Processes
from .protocols import Protocol
from .store import read_header


SHOWN = 60
FILTER_FILE = "filter.npz"


class SavedScorer(ModelFreeScorer):
    """Stands in for a scorer whose scores are all saved; it is never asked for more (``scoring.score_queries``)."""

    def __init__(self, fingerprint: Mapping[str, Any]) -> None:
        """Take the place of the scorer with this fingerprint; that of a whole file will do."""
        self.fingerprint = fingerprint
        self.confidence: Confidence = "answers" if fingerprint.get("gives") == "answers" else "margins"


def name_model(settings: EvalSettings) -> dict[str, str | None]:
    """Return what the model is called, for the first line of a file of scores; a server tells its model itself."""
    if settings.backend != "transformers":
        return {}
    return {key: getattr(settings, key) for key in ("model_name_or_path", "adapter_name_or_path")}


def find_saved(settings: EvalSettings, questions: Mapping[str, Any]) -> SavedScorer:
    """Return the scorer of the one file of ``output_dir`` whose scores these settings ask for.

    Args:
        settings: the evaluation.
        questions: what of the fingerprint the settings decide (``scoring.describe_questions``).

    Raises:
        ConfigError: no file has them, or several; the message says in what the files differ.
    """
    folder = settings.output_dir
    # Files of several processes begin alike.
    found = {path.name.partition(".")[0]: _read_first(path) for path in sorted(folder.glob("scores-*.jsonl"))}
    if not found:
        raise ConfigError(f"saved_scores: {folder} has no scores-*.jsonl. Set output_dir, or evaluate with the model.")
    differences = {name: _list_differences(settings, questions, header) for name, header in found.items()}
    fitting = {name: found[name]["fingerprint"] for name, differing in differences.items() if not differing}
    if not fitting:
        lines = [f"  {name}.jsonl: {'; '.join(differing)}" for name, differing in differences.items()]
        raise ConfigError(
            f"saved_scores: no file in {folder} has scores of these settings.\n"
            + "\n".join(lines)
            + "\nSet these keys as they were and use that version of chatreid_plugin, or evaluate with the model "
            "(saved_scores=false)."
        )
    if len(fitting) > 1:
        raise ConfigError(
            f"saved_scores: several files in {folder} have scores of these settings.\n"
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
        raise ConfigError(f"saved_scores: {path} cannot be read: {error}.") from None


def _list_differences(settings: EvalSettings, questions: Mapping[str, Any], header: Mapping[str, Any]) -> list[str]:
    """Return in words in what saved scores are others than the settings ask for."""
    if not header:
        return ["its first line does not say what its scores depend on"]
    known: dict[str, Any] = {**header["fingerprint"], **header["names"]}
    own = {key: getattr(settings, key) for key in known if key in EvalSettings.model_fields}
    if settings.model is None:
        own.pop("model", None)  # a server's only model need not be named
    if settings.system_prompt is None:
        own.pop("system_prompt", None)  # the checkpoint's own
    wanted: dict[str, Any] = json.loads(json.dumps({**own, **questions}))
    differing = [key for key, value in wanted.items() if known.get(key) != value]
    # Another mode has other keys: what is there says enough.
    told = [key for key in differing if key in known] or differing
    return [f"{key} was {_shorten(known.get(key))}, is {_shorten(wanted[key])}" for key in told]


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


def _describe_filter(settings: EvalSettings, protocol: Protocol, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the features of ``filter: vlm`` and their threshold depend on, but the images' bytes."""
    keys = ["chatreid_stage", "chatreid_aspect", "image_max_pixels", "image_min_pixels", "dtype", "tau"]
    keys += ["filter_recall", "seed"] if settings.tau == "auto" else []
    return {
        **{key: getattr(settings, key) for key in keys},
        **{key: fingerprint.get(key) for key in ("weights", "configuration")},
        "queries": [query.query_id for query in protocol.queries],
        "gallery": [record.image_id for record in protocol.gallery],
    }


def keep_features(
    settings: EvalSettings,
    protocol: Protocol,
    fingerprint: Mapping[str, Any],
    features: tuple[ScoreArray, ScoreArray],
    calibration: Calibration | None,
) -> None:
    """Write the features of ``filter: vlm`` into ``output_dir``, for ``find_features``.

    Args:
        settings: the evaluation.
        protocol: whose queries and gallery they are of.
        fingerprint: the model's.
        features: (Q, D) and (G, D).
        calibration: the threshold, if it was found.
    """
    about = {
        "depends_on": _describe_filter(settings, protocol, fingerprint),
        "calibration": None if calibration is None else asdict(calibration),
    }
    with open_atomically(settings.output_dir / FILTER_FILE) as temporary, temporary.open("wb") as file:
        np.savez(file, queries=features[0], gallery=features[1], about=np.array(json.dumps(about)))


def find_features(
    settings: EvalSettings, protocol: Protocol, fingerprint: Mapping[str, Any], processes: Processes
) -> tuple[ScoreArray, ScoreArray, Calibration | None]:
    """Return what ``keep_features`` wrote in the run whose scores are ranked again.

    Raises:
        DataError: there is no such file, or it is of another model or of other queries, images or settings.
    """
    found = [_read_features(settings, protocol, fingerprint)] if processes.is_first else []
    return processes.gather(found)[0][0]


def _read_features(
    settings: EvalSettings, protocol: Protocol, fingerprint: Mapping[str, Any]
) -> tuple[ScoreArray, ScoreArray, Calibration | None]:
    path = settings.output_dir / FILTER_FILE
    if not path.exists():
        raise DataError(
            f"saved_scores: {path}, the features by which filter: vlm chose the candidates, is missing. Copy it from "
            "the run's folder, or evaluate with the model (saved_scores=false)."
        )
    arrays = open_archive(path, ("queries", "gallery", "about"))
    about = json.loads(str(arrays["about"])) if len(arrays) == 3 else {}
    wanted = json.loads(json.dumps(_describe_filter(settings, protocol, fingerprint)))
    known = about.get("depends_on", {})
    differing = [key for key, value in wanted.items() if known.get(key) != value]
    if differing:
        raise DataError(
            f"saved_scores: the features of filter: vlm in {path} are of another run: {', '.join(differing)} differ. "
            "Set these keys as they were, or evaluate with the model (saved_scores=false)."
        )
    calibration = about["calibration"]
    return arrays["queries"], arrays["gallery"], None if calibration is None else Calibration(**calibration)

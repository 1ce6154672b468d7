"""Rank saved scores without the model that gave them (``saved_scores: true``): find them, stand in for it.

The first line of a file of scores says what they depend on (``store``). What of it the settings decide has to be as it
is now; weights and the like are taken as they stand there, so that neither a checkpoint nor a server is needed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from ..errors import ConfigError
from ..eval_settings import EvalSettings
from ..records import ImageRecord
from .arrays import ScoreArray
from .backends import Confidence
from .queries import Query


# What scorers take from the settings for their part of the fingerprint, where they have it.
SCORER_KEYS = ("image_order", "base_url", "model", "extra_body", "votes")
SHOWN = 60


class SavedScorer:
    """Stands in for a scorer whose scores are all saved; it cannot be asked for more."""

    filled = 0  # the store has what was

    def __init__(self, fingerprint: Mapping[str, Any]) -> None:
        """Take the place of the scorer with this fingerprint; that of a whole file will do."""
        self.fingerprint = fingerprint
        self.confidence: Confidence = "answers" if fingerprint.get("gives") == "answers" else "margins"

    def prepare(
        self, queries: Sequence[Query], gallery: Sequence[ImageRecord], planned: Sequence[ImageRecord] = ()
    ) -> NoReturn:
        """Refuse."""
        raise ConfigError("saved_scores: scores are missing, and no model is loaded. Set saved_scores=false.")

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Refuse."""
        self.prepare([query], candidates)

    def choose(self, query: Query, windows: Sequence[Sequence[ImageRecord]], task: str) -> list[ScoreArray]:
        """Refuse."""
        self.prepare([query], [])


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
    found = {path.name.partition(".")[0]: _read_fingerprint(path) for path in sorted(folder.glob("scores-*.jsonl"))}
    if not found:
        raise ConfigError(f"saved_scores: {folder} has no scores-*.jsonl. Set output_dir, or evaluate with the model.")
    wanted: dict[str, Any] = json.loads(json.dumps(questions))
    differences = {name: _list_differences(settings, wanted, fingerprint) for name, fingerprint in found.items()}
    fitting = {name: found[name] for name, differing in differences.items() if not differing}
    if not fitting:
        lines = [f"  {name}.jsonl: {'; '.join(differing)}" for name, differing in differences.items()]
        raise ConfigError(
            f"saved_scores: no file in {folder} has scores of these settings.\n"
            + "\n".join(lines)
            + "\nSet these keys as they were, or evaluate with the model (saved_scores=false)."
        )
    if len(fitting) > 1:
        raise ConfigError(
            f"saved_scores: several files in {folder} have scores of these settings.\n"
            + "\n".join(_tell_apart(fitting))
            + "\nMove all but one of them into another folder."
        )
    return SavedScorer(next(iter(fitting.values())))


def _read_fingerprint(path: Path) -> dict[str, Any]:
    """Return what a file's scores depend on; nothing where the first line does not say it."""
    try:
        with path.open("rb") as lines:
            fingerprint = json.loads(lines.readline())["fingerprint"]
    except OSError as error:
        raise ConfigError(f"saved_scores: {path} cannot be read: {error}.") from None
    except (ValueError, KeyError, TypeError):
        return {}
    return cast(dict[str, Any], fingerprint) if isinstance(fingerprint, dict) else {}


def _list_differences(
    settings: EvalSettings, questions: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> list[str]:
    """Return in words in what saved scores are others than the settings ask for."""
    if not fingerprint:
        return ["its first line does not say what its scores depend on"]
    named = {key: getattr(settings, key) for key in SCORER_KEYS if key in fingerprint}
    wanted = {key: value for key, value in named.items() if value is not None} | dict(questions)
    differing = [key for key, value in wanted.items() if fingerprint.get(key) != value]
    # Another mode has other keys: what is there says enough.
    told = [key for key in differing if key in fingerprint] or differing
    return [f"{key} was {_shorten(fingerprint.get(key))}, is {_shorten(wanted[key])}" for key in told]


def _tell_apart(fitting: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line a file with what not all of them have alike."""
    keys = sorted({key for fingerprint in fitting.values() for key in fingerprint})
    differing = [key for key in keys if len({json.dumps(one.get(key)) for one in fitting.values()}) > 1]
    return [
        f"  {name}.jsonl: {', '.join(f'{key} {_shorten(one.get(key))}' for key in differing)}"
        for name, one in fitting.items()
    ]


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."

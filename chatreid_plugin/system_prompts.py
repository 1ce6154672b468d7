"""The system prompt that a checkpoint was trained with: a small file beside its weights.

LLaMA-Factory's ``default_system`` takes the place of the template's own words, and no file of a checkpoint says so.
Training writes the file; evaluation, ``chatreid serve`` and LLaMA-Factory's own inference read it.
"""

from pathlib import Path
from typing import cast

from .errors import DataError
from .shards import read_json, write_json


RECORD = "chatreid_training.json"


def write_system_prompt(folder: Path, prompt: str) -> None:
    """Record the system prompt in a checkpoint's or an adapter's folder; empty where training had none."""
    write_json(folder / RECORD, {"system_prompt": prompt})


def read_system_prompt(folder: Path) -> str | None:
    """Return the recorded system prompt, None where there is no record: of a hub's model, or of an older version.

    Raises:
        DataError: the file cannot be read, or holds no system prompt.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    content: object = read_json(path)
    prompt = cast(dict[str, object], content).get("system_prompt") if isinstance(content, dict) else None
    if not isinstance(prompt, str):
        raise DataError(f"{path} holds no system_prompt. Remove it and set system_prompt in the evaluation.")
    return prompt

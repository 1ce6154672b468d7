"""A training recipe read and parsed as ``llamafactory-cli train`` does, but without a model, GPU or process group."""

import difflib
import inspect
import logging
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from ..errors import ConfigError
from ..shards import read_json
from ..upstream import get_upstream
from ..yaml_files import YAML_DAMAGE, name_fault, read_yaml


State = Literal["ok", "warning", "error"]

# What decides on devices and processes; the parse leaves it out, and the checks read it from ``Recipe.values``.
_FOR_THE_LAUNCH: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "pure_bf16": False,
    "tf32": None,
    "deepspeed": None,
    "fsdp": None,
    "fsdp_config": None,
    "overwrite_output_dir": True,
}
# With these set, torchrun's own, TrainingArguments would wait for the other processes.
_LAUNCHER_VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination: what was looked at, its state, what was found, what to do."""

    check: str
    state: State
    found: str
    advice: str = ""

    def render(self) -> str:
        """Return the finding as one line."""
        return f"{self.state:<8} {self.check}: {self.found}" + (f". {self.advice}" if self.advice else "")


class Findings(list[Finding]):
    """What one check finds: errors and warnings, or else that all is well."""

    def __init__(self, check: str) -> None:
        super().__init__()
        self.check = check

    def error(self, found: str, advice: str) -> None:
        """Add what stops a run."""
        self.append(Finding(self.check, "error", found, advice))

    def warn(self, found: str, advice: str) -> None:
        """Add what a run goes on with."""
        self.append(Finding(self.check, "warning", found, advice))

    def or_ok(self, found: str) -> "Findings":
        """Return the findings; that all is well if there are none."""
        if not self:
            self.append(Finding(self.check, "ok", found))
        return self


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe: the YAML's values with the overrides, and LLaMA-Factory's argument objects made of them.

    ``values`` is what the user wrote; LLaMA-Factory changes some while it parses.
    """

    path: Path
    values: dict[str, Any]
    model: Any
    data: Any
    training: Any
    finetuning: Any

    @property
    def cutoff_len(self) -> int:
        """The longest sequence as written, in tokens; LLaMA-Factory 0.9.5 takes one off for packing (data_args.py)."""
        return self.data.cutoff_len + bool(self.data.packing)

    def read_deepspeed(self) -> dict[str, Any] | None:
        """Return the DeepSpeed configuration, None without one.

        Raises:
            ConfigError: the value is neither a file name nor a mapping, or the file holds no JSON object.
            DataError: the file is missing or no JSON.
        """
        value = self.values.get("deepspeed")
        if not value:
            return None
        content = read_json(Path(value)) if isinstance(value, str) else value
        if not isinstance(content, dict):
            raise ConfigError(f"deepspeed: {value} holds no JSON object.")
        return content


def read_values(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's values, with ``key=value`` overrides, as LLaMA-Factory 0.9.5 merges them (hparams/parser.py).

    Raises:
        ConfigError: no such file, no mapping, or not YAML.
    """
    if not path.is_file():
        raise ConfigError(f"Recipe {path} does not exist. `chatreid init DIR` writes the shipped ones.")
    wrong = [override for override in overrides if "=" not in override]
    if wrong:
        raise ConfigError(f"Overrides are written key=value; found {', '.join(wrong)}.")
    recipe = read_yaml(path)
    try:
        merged = OmegaConf.merge(recipe, OmegaConf.from_cli(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except YAML_DAMAGE as error:
        raise ConfigError(f"{path} and the overrides cannot be read as YAML: {name_fault(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no `key: value` lines.")
    return {str(key): value for key, value in values.items()}


def parse_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """Read a recipe and let LLaMA-Factory's own parser judge it.

    The parser is LLaMA-Factory's, below our wrapper: ours would compose Stage 2's checkpoint.

    Raises:
        ConfigError: unknown keys, values of another type, or what LLaMA-Factory refuses.
    """
    import llamafactory.hparams.parser as module

    values = read_values(path, overrides)
    classes: list[Any] = get_upstream(module, "_TRAIN_ARGS")
    faults = list_unknown_keys(values, classes) + list_wrong_values(values, classes)
    if faults:
        raise ConfigError("; ".join(faults))
    get_train_args = inspect.unwrap(get_upstream(module, "get_train_args"))
    known = {field.name for item in classes for field in fields(item)}
    neutral = {key: value for key, value in _FOR_THE_LAUNCH.items() if key in known}
    try:
        with _parse_quietly():
            model, data, training, finetuning, _ = get_train_args(values | neutral)
    except ConfigError:
        raise
    except Exception as error:  # argument classes assert, and raise whatever their checks run into
        raise ConfigError(f"LLaMA-Factory refuses the recipe: {error or type(error).__name__}") from None
    return Recipe(path, values, model, data, training, finetuning)


@contextmanager
def _parse_quietly() -> Generator[None]:
    """Hide torchrun's variables, and the parser's advice on the values that were left out for it."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHER_VARIABLES if name in os.environ}
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
        os.environ.update(hidden)


def list_unknown_keys(values: dict[str, Any], classes: Sequence[Any]) -> list[str]:
    """Return a message for each key that no argument class has, with the nearest one that exists."""
    known = sorted({field.name for item in classes for field in fields(item) if field.init})
    faults: list[str] = []
    for key in sorted(values.keys() - set(known)):
        near = difflib.get_close_matches(key, known, n=1)
        faults.append(f"unknown key {key}" + (f" (meant {near[0]}?)" if near else ""))
    return faults


def list_wrong_values(values: dict[str, Any], classes: Sequence[Any]) -> list[str]:
    """Return a message for each number, switch or choice of another type; LLaMA-Factory checks few of them.

    A YAML's values reach its argument classes as they are, and a wrong one raises much later, or never.
    """
    faults: list[str] = []
    for item in classes:
        hints = get_type_hints(item)
        for key in sorted(hints.keys() & values.keys()):
            if not _fits(values[key], hints[key]):
                faults.append(f"{key}: {values[key]!r} is not {_describe_type(hints[key])}")
    return faults


def _list_members(hint: Any) -> tuple[Any, ...]:
    members = get_args(hint)
    return (hint,) if get_origin(hint) is Literal or not members else members


def _fits(value: Any, hint: Any) -> bool:
    members = _list_members(hint)
    if value is None or any(m not in (int, float, bool, NoneType) and get_origin(m) is not Literal for m in members):
        return True  # only plain types are judged; null means the default to some of LLaMA-Factory's keys
    choices = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    accepted = (int, float) if float in members else tuple(m for m in members if m in (int, bool))
    return value in choices or (bool(accepted) and isinstance(value, accepted))


def _describe_type(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
    return " or ".join(names.get(member) or f"one of {get_args(member)}" for member in _list_members(hint))

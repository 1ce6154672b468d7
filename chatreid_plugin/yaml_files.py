"""YAML of strangers: what it may hold and repeat is bounded, and whatever is wrong with it is one message."""

import io
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError
from .regular_files import open_regular


# A recipe has some hundred values; YAML of a few hundred bytes may name a thousand million by repeating itself.
MOST_BYTES = 2**20
MOST_VALUES = 100_000
# What PyYAML and OmegaConf raise for a stranger's text: whatever they stumble over.
YAML_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OmegaConfBaseException,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
    yaml.YAMLError,
)


def read_yaml(path: Path) -> Any:
    """Return the keys of a YAML file as OmegaConf reads it; an empty file has none.

    Raises:
        ConfigError: the file is missing or cannot be read, is not YAML, has no keys, or has more values than a recipe
            has, once everything that repeats (``*name``) is written out.
    """
    text = _read_text(path)
    try:
        plain = yaml.safe_load(text)
        if not isinstance(plain, dict | None):
            raise ValueError("it must have keys, each with a colon")
        if _count_values(plain, {}) > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
        return OmegaConf.load(io.StringIO(text))
    except YAML_DAMAGE as error:
        raise ConfigError(f"{path} cannot be read as YAML: {name_fault(error)}") from None


def name_fault(error: Exception) -> str:
    """Return what one of ``YAML_DAMAGE`` says, for messages."""
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)


def _read_text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            text = file.read(MOST_BYTES).decode("utf-8-sig")
            if file.read(1):
                raise ConfigError(f"{path} is no configuration: it has more than {MOST_BYTES:,} bytes.")
            return text
    except FileNotFoundError:
        raise ConfigError(f"Configuration file {path} does not exist.") from None
    except OSError as error:
        raise ConfigError(f"Configuration file {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read as YAML: it is not text in UTF-8 ({error}).") from None


def _count_values(value: Any, counted: dict[int, int]) -> int:
    """Return how many values there are once every ``*name`` of YAML is written out; each is looked at once."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counted:
        counted[id(value)] = MOST_VALUES + 1  # of what holds itself
        parts: Any = [*value, *value.values()] if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_count_values(part, counted) for part in parts)
    return counted[id(value)]

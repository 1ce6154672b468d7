"""Helpers that tests import."""

from collections.abc import Mapping
from typing import Any

from chatreid_plugin.config import list_sections
from chatreid_plugin.eval.settings import EvalSettings


def place_key(key: str) -> list[str]:
    """Return where a key without a section is, ``filter.top_k`` for ``top_k``: keyword arguments have no dots."""
    if key in EvalSettings.renamed:
        return EvalSettings.renamed[key].split(" and ")
    sections = list_sections(EvalSettings).items()
    return [key] if "." in key else [f"{name}.{key}" for name, section in sections if key in section.model_fields]


def nest(keys: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return sections out of keys without them, or with dots."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in keys.items():
        for place in place_key(key):
            section, _, name = place.partition(".")
            sections.setdefault(section, {})[name] = value
    return sections


def make_eval_settings(keys: Mapping[str, Any]) -> EvalSettings:
    """Return checked settings out of keys without sections."""
    return EvalSettings.model_validate(nest(keys))


def alter(settings: EvalSettings, keys: Mapping[str, Any]) -> EvalSettings:
    """Return settings with some keys changed, unchecked."""
    return settings.replace(**nest(keys))

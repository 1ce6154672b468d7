"""Whether a manifest is the protocol's data set and has the labels its rules need; checked before anything is scored.

A number that is measured on another data set would stand under the protocol's name, beside published ones.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...eval_settings import EvalSettings
from ...records import ImageRecord
from ...shards import read_manifest_provenance


# The data set of a protocol, by its parser's name; the protocols that are not listed take any.
DATASETS: Mapping[str, str] = {
    "market1501": "market1501",
    "msmt17": "msmt17",
    "cuhk03": "cuhk03",
    "cuhk03_classic": "cuhk03",
    "ltcc": "ltcc",
    "prcc": "prcc",
    "sysumm01": "sysumm01",
    "regdb": "regdb",
    "llcm": "llcm",
    "cuhkpedes": "cuhkpedes",
    "icfgpedes": "icfgpedes",
    "rstpreid": "rstpreid",
}
# The form of a data set that a manifest has if its source does not name one: the parsers' default.
DEFAULT_VARIANTS = {"msmt17": "v1", "cuhk03": "detected"}
# The parser of a user's own folders says nothing of the data set, so that the name that the user gave it counts.
OWN_FOLDERS = "pattern"


def name_dataset(provenance: Mapping[str, Any], records: Sequence[ImageRecord]) -> tuple[str, bool]:
    """Return which data set a manifest holds, and whether a parser vouches for it.

    What no parser of a known data set has read (a manifest of one's own making) goes by the name in its records.
    """
    source = provenance.get("source") or {}
    parser = source.get("parser") or source.get("name")
    if parser and parser != OWN_FOLDERS:
        return str(parser), True
    return str(source.get("name") or (records[0].dataset if records else "")), parser == OWN_FOLDERS


def check_dataset(settings: EvalSettings, provenance: Mapping[str, Any], records: Sequence[ImageRecord]) -> None:
    """Refuse the manifest of another data set, or of another form of it than ``variant`` of the settings.

    A manifest without a parser is refused if its name is that of another benchmark.

    Raises:
        DataError: names the data set, and the protocol that fits it.
    """
    wanted = DATASETS.get(settings.protocol)
    dataset, parsed = name_dataset(provenance, records)
    if wanted is not None and dataset != wanted and (parsed or dataset in DATASETS.values()):
        fitting = [protocol for protocol, known in DATASETS.items() if known == dataset]
        advice = f"use protocol: {' or '.join(fitting)}" if fitting else "no benchmark's protocol fits it"
        raise DataError(
            f"{settings.manifest} holds the data set {dataset}, but protocol: {settings.protocol} measures {wanted}. "
            f"Choose another manifest, or {advice}; protocol: folder measures any data with queries and a gallery."
        )
    variant = get_variant(provenance) or DEFAULT_VARIANTS.get(dataset, "")
    if settings.variant is not None and variant.partition("_")[0] != settings.variant:
        raise DataError(
            f"{settings.manifest} holds {dataset} in the form {variant or '(none named)'}, but the settings say "
            f"variant: {settings.variant}. Choose the manifest of that form, or the file of eval/ for this one."
        )


def check_split(manifest: Path, split: int) -> None:
    """Refuse a manifest of another split than the one it is named for: the mean would count one split several times.

    What is missing, damaged, or was made by no parser is left to whoever reads it.

    Raises:
        DataError: names both splits.
    """
    try:
        found = (read_manifest_provenance(manifest).get("protocol") or {}).get("trial")
    except DataError:
        return
    if found not in (None, split):
        raise DataError(
            f"{manifest} stands for split {split}, but was parsed as split {found}. Parse it again with "
            f"`trial: {split}` in its source."
        )


def get_variant(provenance: Mapping[str, Any]) -> str:
    """Return the form of the data set that the manifest's source names, e.g. ``v2``; empty if it names none."""
    return str((provenance.get("source") or {}).get("variant") or "")


def check_labels(settings: EvalSettings, queries: Sequence[ImageRecord], gallery: Sequence[ImageRecord]) -> None:
    """Refuse a manifest without the clothes or modalities that the protocol's rules are about.

    Raises:
        DataError: names what is missing.
    """
    sides = {"query": queries, "gallery": gallery}
    if settings.protocol == "ltcc" and settings.setting != "standard":
        bare = [name for name, records in sides.items() if not any(record.clothes_id for record in records)]
        _refuse_if(bare, settings.manifest, "has a clothes label, and the setting is about clothes")
    if DATASETS.get(settings.protocol) in ("sysumm01", "regdb", "llcm"):
        found = [{record.modality for record in records} for records in sides.values()]
        mixed = [] if found in ([{"infrared"}, {"visible"}], [{"visible"}, {"infrared"}]) else ["query or gallery"]
        _refuse_if(mixed, settings.manifest, "fits: one side must be infrared and the other visible")


def _refuse_if(sides: Sequence[str], manifest: Path, problem: str) -> None:
    if sides:
        raise DataError(
            f"{manifest}: no {' and no '.join(sides)} image {problem}. "
            "Parse the data set again, or use protocol: folder."
        )

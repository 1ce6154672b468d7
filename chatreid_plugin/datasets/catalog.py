"""The data sets we know: layout, published counts, licence and where to ask for them (``catalog.yaml``).

Counts carry the confidence of the shared notes on protocols: V counted in the published files, P stated by the
authors, K widely reported. V and P must agree with what is parsed, K only warns.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

from ..config import Settings, SourceSettings
from ..errors import ConfigError, DataError
from ..records import Split
from .listing import Crop


CATALOG_FILE = Path(__file__).with_name("catalog.yaml")
Setting = Literal["standard", "cloth-changing", "visible-infrared", "text-to-image", "attributes", "captions", "any"]
_DUKE_FOLDER = re.compile(r"duke[-_ ]?mtmc|(?:occluded|p)[-_ ]?duke", re.IGNORECASE)


class Count(Settings):
    """Published size of a split; None where nobody says.

    ``identities`` leaves out Market-1501's distractors (identity 0000).
    """

    images: int | None = None
    identities: int | None = None
    captions: int | None = None
    confidence: Literal["V", "P", "K"]


class CatalogEntry(Settings):
    """One data set.

    Attributes:
        title: as its authors write it.
        setting: what kind of Re-ID it is made for.
        layout: the folders and files, as in the published archive.
        file_name: an example of a file name.
        variants: values of a source's ``variant``, the default first; empty if there is one form only.
        counts: variant (``default`` without variants) -> split -> published size.
        licence: the terms of use, in a sentence.
        source: where to ask for the data.
        used_for: what the project uses it for.
        labels: what the records have besides identity: camera, clothes, modality, captions, attributes.
    """

    title: str
    setting: Setting
    layout: str
    file_name: str
    variants: tuple[str, ...] = ()
    counts: dict[str, dict[Split, Count]] = {}
    licence: str
    source: str
    used_for: str
    labels: tuple[str, ...] = ()


@cache
def read_catalog() -> dict[str, CatalogEntry]:
    """Return parser name -> entry, in the file's order."""
    entries = yaml.safe_load(CATALOG_FILE.read_text(encoding="utf-8"))
    return {name: CatalogEntry.model_validate(entry) for name, entry in entries.items()}


def refuse_withdrawn(source: SourceSettings) -> None:
    """Refuse DukeMTMC and everything made from it, by name.

    Its images were taken without the consent of the people shown and its authors withdrew it in 2019; the ChatReID
    paper leaves it out for that reason (section 5).

    Raises:
        ConfigError: the source's name, parser or folder says Duke.
    """
    # A folder further up may be the home of somebody called Duke.
    above = [part for part in source.root.resolve().parts[-3:] if _DUKE_FOLDER.search(part)]
    for value in (source.name, source.parser_name, source.root.name, *above):
        if "duke" in value.lower():
            raise ConfigError(
                f"Source {source.name}: {value!r} looks like DukeMTMC or a set made from it (Occluded-Duke, P-Duke, "
                "...). Its authors withdrew it in 2019, since the people shown had not agreed; the paper leaves it "
                "out (section 5), and so do we. Use another data set."
            )


def get_variant(source: SourceSettings) -> str:
    """Return the source's variant, or the default one (``default`` if the data set has one form only).

    Raises:
        ConfigError: the data set has no such variant.
    """
    variants = read_catalog()[source.parser_name].variants
    if source.variant is None:
        return variants[0] if variants else "default"
    if source.variant not in variants:
        known = ", ".join(variants) or "none"
        raise ConfigError(
            f"Source {source.name}: unknown variant {source.variant!r}. {source.parser_name} has {known}."
        )
    return source.variant


def check_counts(source: SourceSettings, crops: Sequence[Crop]) -> list[str]:
    """Compare the crops with the published counts and return warnings.

    Raises:
        DataError: a V or P count differs and ``allow_count_mismatch`` is off.
    """
    warnings: list[str] = []
    entry = read_catalog()[source.parser_name]
    for split, count in entry.counts.get(get_variant(source), {}).items():
        chosen = [crop for crop in crops if crop.split == split]
        found = {
            "images": len(chosen),
            # In Market-1501's gallery, 0000 is nobody: its images are distractors.
            "identities": len({crop.person for crop in chosen} - ({"0000"} if split == "gallery" else set())),
            "captions": sum(bool(caption) for crop in chosen for caption in crop.captions),
        }
        for what, number in found.items():
            published = getattr(count, what)
            if published in (None, number):
                continue
            message = f"{source.root}: split {split} has {number} {what}, {entry.title} has {published}"
            if count.confidence != "K" and not source.allow_count_mismatch:
                raise DataError(
                    f"{message}. Get the missing files, or set allow_count_mismatch: true in the recipe's source "
                    "(of the first one: sources.0.allow_count_mismatch=true)."
                )
            warnings.append(message)
    return warnings

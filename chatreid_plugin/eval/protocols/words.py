"""Queries with words: text-to-image sets, retrieval by attributes, and images together with what is said of them."""

from collections.abc import Mapping
from dataclasses import replace

from ...errors import DataError
from ...eval_settings import EvalSettings
from ...records import ImageRecord
from ..queries import Query, make_image_query
from .definition import RULES, Protocol
from .source import Source


def load_text(source: Source, settings: EvalSettings) -> Protocol:
    """CUHK-PEDES, ICFG-PEDES, RSTPReid: every caption asks, every image of the identity matches (IRRA, metrics.py).

    Raises:
        DataError: the gallery has no captions.
    """
    queries = [
        Query(f"{record.image_id}#{number}", record.person_id, text=caption)
        for record in source.gallery
        for number, caption in enumerate(record.captions)
    ]
    if not queries:
        raise DataError(
            f"{source.path}: no gallery image has a caption. Name the captions in the data engine's recipe."
        )
    variant = f"every caption asks, {RULES['nothing']}"
    return Protocol(settings.protocol, variant, queries, source.gallery, source.image_root, "nothing")


def _name_combination(attributes: Mapping[str, str]) -> str:
    return "attributes:" + ", ".join(f"{name}={value}" for name, value in attributes.items())


def load_attributes(source: Source, settings: EvalSettings) -> Protocol:
    """Every combination of ``attributes`` that the gallery has asks for the images that have it (paper section 3.3).

    Without ``attributes`` all names that every gallery image is labelled with are asked for. An image's combination
    takes the place of its identity.

    Raises:
        DataError: no image has the attributes.
    """
    labelled = [record for record in source.gallery if record.attributes]
    common = sorted(set.intersection(*(set(record.attributes) for record in labelled))) if labelled else []
    names = list(settings.attributes) or common
    gallery: list[ImageRecord] = []
    combinations: dict[str, dict[str, str]] = {}
    for record in source.gallery:
        asked = {name: record.attributes[name] for name in names if name in record.attributes}
        if len(asked) == len(names) > 0:
            key = _name_combination(asked)
            combinations[key] = asked
            gallery.append(replace(record, person_id=key))
    if not gallery:
        known = sorted({name for record in labelled for name in record.attributes})
        raise DataError(
            f"{source.path}: no gallery image has all of the attributes {', '.join(names) or '(none)'}; "
            f"known: {', '.join(known) or 'none'}. Name some with attributes: [...]."
        )
    queries = [Query(key, key, attributes=asked) for key, asked in sorted(combinations.items())]
    variant = f"combinations of {', '.join(names)}, {len(gallery)} labelled images, {RULES['nothing']}"
    return Protocol(settings.protocol, variant, queries, gallery, source.image_root, "nothing")


def load_multimodal(source: Source, settings: EvalSettings) -> Protocol:
    """Every query image asks together with its caption or attributes (paper section 3.3, adaptive retrieval).

    Where the data set has no query split, every gallery image asks, and its own camera is ignored with itself.

    Raises:
        DataError: no query has words.
    """
    queries: list[Query] = []
    for record in source.queries or source.gallery:
        if record.captions or record.attributes:
            text = record.captions[0] if record.captions else ""
            queries.append(replace(make_image_query(record), text=text, attributes={} if text else record.attributes))
    if not queries:
        raise DataError(f"{source.path}: no query has a caption or attributes; use the data set's own protocol.")
    variant = f"image with words, {RULES['same_camera']}"
    return Protocol(settings.protocol, variant, queries, source.gallery, source.image_root)

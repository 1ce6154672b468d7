"""Queries with words: text-to-image sets, retrieval by attributes, and images together with what is said of them."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...errors import DataError
from ...eval_settings import EvalSettings
from ...records import ImageRecord
from ..queries import Query, make_image_query
from .definition import RULES, Protocol
from .source import Source


def load_text(source: Source, settings: EvalSettings) -> Protocol:
    """CUHK-PEDES, ICFG-PEDES, RSTPReid: every caption asks, every image of the identity matches (IRRA, metrics.py).

    With ``setting: image_to_text`` it is turned round, as there: every image asks, every caption of the identity
    matches.

    Raises:
        DataError: the gallery has no captions.
    """
    captions = [
        replace(record, image_id=f"{record.image_id}#{number}", captions=(caption,))
        for record in source.gallery
        for number, caption in enumerate(record.captions)
        if caption  # the numbers are those of the data set's file, where a caption may be empty
    ]
    if not captions:
        raise DataError(
            f"{source.path}: no gallery image has a caption. Name the captions in the data engine's recipe."
        )
    if settings.setting == "image_to_text":
        images = [make_image_query(record) for record in source.gallery]
        variant = f"every image asks, captions are ranked, {RULES['nothing']}"
        return Protocol(
            settings.protocol, variant, images, captions, source.image_root, "nothing", ranks_captions=True
        )
    queries = [Query(record.image_id, record.person_id, text=record.captions[0]) for record in captions]
    variant = f"every caption asks, {RULES['nothing']}"
    return Protocol(settings.protocol, variant, queries, source.gallery, source.image_root, "nothing")


def _label_by_attributes(source: Source, settings: EvalSettings) -> tuple[list[str], dict[str, Mapping[str, str]]]:
    """Return the attributes that are asked for, and image id to values of those that have all of them.

    Without ``attributes`` in the settings all names that every labelled gallery image has are asked for.

    Raises:
        DataError: no image has the attributes.
    """
    labelled = [record for record in source.gallery if record.attributes]
    common = sorted(set.intersection(*(set(record.attributes) for record in labelled))) if labelled else []
    names = list(settings.attributes) or common
    found: dict[str, Mapping[str, str]] = {
        record.image_id: {name: record.attributes[name] for name in names}
        for record in labelled
        if names and all(name in record.attributes for name in names)
    }
    if not found:
        known = sorted({name for record in labelled for name in record.attributes})
        raise DataError(
            f"{source.path}: no gallery image has all of the attributes {', '.join(names) or '(none)'}; "
            f"known: {', '.join(known) or 'none'}. Name some with attributes: [...]."
        )
    return names, found


def _name_combination(attributes: Mapping[str, str]) -> str:
    return "attributes:" + ", ".join(f"{name}={value}" for name, value in attributes.items())


def load_attributes(source: Source, settings: EvalSettings) -> Protocol:
    """Every combination of ``attributes`` that the gallery has asks for the images that have it (paper section 3.3).

    An image's combination takes the place of its identity.

    Raises:
        DataError: no image has the attributes.
    """
    names, found = _label_by_attributes(source, settings)
    gallery = _match_by_attributes(source.gallery, found)
    combinations = {_name_combination(asked): asked for asked in found.values()}
    queries = [Query(key, key, attributes=asked) for key, asked in sorted(combinations.items())]
    variant = f"combinations of {', '.join(names)}, {len(gallery)} labelled images, {RULES['nothing']}"
    return Protocol(settings.protocol, variant, queries, gallery, source.image_root, "nothing")


def _match_by_attributes(records: Sequence[ImageRecord], found: Mapping[str, Mapping[str, str]]) -> list[ImageRecord]:
    """Return the labelled images, with their combination of attributes for an identity."""
    return [
        replace(record, person_id=_name_combination(found[record.image_id]))
        for record in records
        if record.image_id in found
    ]


def _share_people(queries: Sequence[ImageRecord], gallery: Sequence[ImageRecord]) -> bool:
    """Return whether any query shows somebody whom another gallery image shows."""
    images = Counter(record.person_id for record in gallery)
    own = {record.image_id for record in gallery}
    return any(images[record.person_id] > (record.image_id in own) for record in queries)


def load_multimodal(source: Source, settings: EvalSettings) -> Protocol:
    """Every query image asks together with words about the person (paper section 3.3, adaptive retrieval).

    The words are a caption of another image of the same person, or, in sets without captions, the image's attributes;
    an image that nobody has described in other words does not ask. Where the data set has no query split, every
    gallery image asks, and its own camera is ignored with itself. Of an attribute set, where no two images show the
    same person, or with ``attributes`` in the settings, images match that have the same attributes, as in
    ``load_attributes``; then only the query's own image is ignored.

    Raises:
        DataError: no query has words.
    """
    asking = source.queries or source.gallery
    has_attributes = any(record.attributes for record in source.gallery)
    if settings.attributes or (has_attributes and not _share_people(asking, source.gallery)):
        return _ask_with_attributes(source, settings)
    images = list({record.image_id: record for record in [*source.gallery, *source.queries]}.values())
    captioned = any(any(record.captions) for record in images)
    queries: list[Query] = []
    by_person: defaultdict[str, list[ImageRecord]] = defaultdict(list)
    for record in images:
        by_person[record.person_id].append(record)
    for record in asking:
        query = make_image_query(record)
        if captioned and (text := find_other_words(record, by_person[record.person_id])):
            queries.append(replace(query, text=text))
        elif not captioned and record.attributes:
            queries.append(replace(query, attributes=record.attributes))
    if not queries:
        raise DataError(
            f"{source.path}: no query has attributes or is described in other words than its own; use the data set's "
            "own protocol."
        )
    variant = f"image with words of another image, {len(queries)} of {len(asking)} ask, {RULES['same_camera']}"
    return Protocol(settings.protocol, variant, queries, source.gallery, source.image_root)


def find_other_words(query: ImageRecord, same: Sequence[ImageRecord]) -> str:
    """Return a caption that tells more of the query's person than its own captions do, or an empty text.

    As in training (``list_other_words`` of the data engine): of an image in other clothes, else of another camera,
    else any other one; the first in the data set's order.

    Args:
        query: the image that asks.
        same: all images of its person.
    """

    def rank(other: ImageRecord) -> int:
        changed = None not in (other.clothes_id, query.clothes_id) and other.clothes_id != query.clothes_id
        return 0 if changed else 1 if other.camera_id != query.camera_id else 2

    words = [
        (rank(other), caption)
        for other in same
        for caption in other.captions
        if caption and caption not in query.captions
    ]
    return min(words, key=lambda ranked: ranked[0])[1] if words else ""


def _ask_with_attributes(source: Source, settings: EvalSettings) -> Protocol:
    """Let every labelled gallery image ask, with its attributes, for the others that have them."""
    names, found = _label_by_attributes(source, settings)
    gallery = _match_by_attributes(source.gallery, found)
    queries = [replace(make_image_query(record), attributes=found[record.image_id]) for record in gallery]
    variant = f"image with {', '.join(names)}, {len(gallery)} labelled images, {RULES['same_image']}"
    return Protocol(settings.protocol, variant, queries, gallery, source.image_root, "same_image")

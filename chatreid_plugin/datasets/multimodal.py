"""Images that ask together with words, in any set that has captions or attributes (paper section 3.3)."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ..errors import DataError
from ..records import ImageRecord
from .attributes import label_by_attributes, match_by_attributes
from .benchmark import RULES, Benchmark, BenchmarkRules, Choices, Query, Source, make_image_query


def _share_people(queries: Sequence[ImageRecord], gallery: Sequence[ImageRecord]) -> bool:
    """Return whether any query shows somebody whom another gallery image shows."""
    images = Counter(record.person_id for record in gallery)
    own = {record.image_id for record in gallery}
    return any(images[record.person_id] > (record.image_id in own) for record in queries)


def load_multimodal(source: Source, choices: Choices) -> Benchmark:
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
    if choices.attributes or (has_attributes and not _share_people(asking, source.gallery)):
        return _ask_with_attributes(source, choices)
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
    return Benchmark(source.name, variant, queries, source.gallery, source.image_root)


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


def _ask_with_attributes(source: Source, choices: Choices) -> Benchmark:
    """Let every labelled gallery image ask, with its attributes, for the others that have them."""
    names, found = label_by_attributes(source, choices)
    gallery = match_by_attributes(source.gallery, found)
    queries = [replace(make_image_query(record), attributes=found[record.image_id]) for record in gallery]
    variant = f"image with {', '.join(names)}, {len(gallery)} labelled images, {RULES['same_image']}"
    return Benchmark(source.name, variant, queries, gallery, source.image_root, "same_image")


BENCHMARKS = {"multimodal": BenchmarkRules(load_multimodal, queries_apart=False)}

"""Whether a query's own file lies in the gallery: a match that any model finds, unless a rule or a key ignores it."""

from collections.abc import Mapping, Sequence

import numpy as np

from ...records import ImageRecord
from ..arrays import IntArray
from ..queries import Query


def _name_file(record: ImageRecord) -> str:
    """Return what is the same for two records of one file: the hash of its bytes, or its path if nobody looked."""
    return record.content_hash or record.path


def find_copies(queries: Sequence[Query], gallery: Sequence[ImageRecord]) -> Mapping[int, IntArray]:
    """Return the gallery indices, ascending, of each query's own file; queries without any are left out."""
    asked = {_name_file(query.image) for query in queries if query.image is not None}
    places: dict[str, list[int]] = {}
    for place, record in enumerate(gallery):
        if (name := _name_file(record)) in asked:
            places.setdefault(name, []).append(place)
    found = {number: _name_file(query.image) for number, query in enumerate(queries) if query.image is not None}
    return {number: np.array(places[name], dtype=np.int64) for number, name in found.items() if name in places}

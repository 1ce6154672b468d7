"""What is searched for: an image, a text, attributes, or an image together with words."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..records import ImageRecord


# Queries of which a model may compute something at once.
QUERY_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Query:
    """One query of an evaluation.

    Attributes:
        query_id: unique in its protocol: the image's id, or ``<image id>#<caption number>`` and the like.
        person_id: whom it asks for; gallery images of this identity match.
        camera_id: camera of its image; empty for words.
        clothes_id: outfit in its image, where the data set has one.
        image: the picture, or None for words alone.
        text: what is said of the person in words; empty for an image alone.
        attributes: attributes asked for, name to value.
    """

    query_id: str
    person_id: str
    camera_id: str = ""
    clothes_id: str | None = None
    image: ImageRecord | None = None
    text: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def label(self) -> str:
        """What a message or a page calls it: the image's path, or its words."""
        return self.image.path if self.image is not None else f'"{self.text}"' if self.text else self.query_id


def make_image_query(record: ImageRecord) -> Query:
    """Return the query that shows this image and says nothing."""
    return Query(record.image_id, record.person_id, record.camera_id, record.clothes_id, record)

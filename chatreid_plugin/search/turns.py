"""What one turn of a search adds, and what is wanted once the turns are added up."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn adds to a search, and all that is wanted once the turns are added up (``add_turn``).

    Attributes:
        image: content hash of the picture to search for.
        text: words.
        attributes: name to value; an empty value drops what an earlier turn said.
        weight: ``scoring.text_weight``.
        same: confirmed pictures.
        different: pictures that are not the one.
        cameras: the only ones that count; all if empty.
        after: ISO 8601; pictures taken earlier, or nobody knows when, do not count.
        before: the same of later ones.
        unknown: attributes of which the user cannot tell.
        forget: names of the above of which earlier turns' values are dropped first.
    """

    image: str = ""
    text: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])
    weight: float | None = None
    same: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    after: str = ""
    before: str = ""
    unknown: tuple[str, ...] = ()
    forget: tuple[str, ...] = ()


def add_turn(before: Turn, turn: Turn) -> Turn:
    """Return what is wanted after a turn."""

    def known(name: str) -> Any:
        return getattr(Turn() if name in turn.forget else before, name)

    attributes = {**known("attributes"), **turn.attributes}
    marked = {*turn.same, *turn.different}
    unknown = dict.fromkeys([*known("unknown"), *turn.unknown])
    return Turn(
        image=turn.image or known("image"),
        text=", ".join(part for part in (known("text"), turn.text) if part),
        attributes={name: value for name, value in attributes.items() if value},
        weight=known("weight") if turn.weight is None else turn.weight,
        same=(*(one for one in known("same") if one not in marked), *turn.same),
        different=(*(one for one in known("different") if one not in marked), *turn.different),
        cameras=turn.cameras or known("cameras"),
        after=turn.after or known("after"),
        before=turn.before or known("before"),
        unknown=tuple(name for name in unknown if not turn.attributes.get(name)),
    )

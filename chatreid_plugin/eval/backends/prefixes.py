"""What stands before the candidates of a question, computed once for each query and for a block of queries at a time.

One such beginning is a hundred tokens: alone it would leave a GPU idle for as long as the candidates take.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..prompts import Prompt
from ..queries import QUERY_BLOCK
from .decoder import Decoder, KeysAndValues
from .memory import Batcher
from .tokens import Tokenizer, Tokens
from .vision_features import Grid, VisionFeatures


# Beginnings kept: those of two blocks, since the two image orders take turns.
KEPT = 2 * QUERY_BLOCK
# A grid for the first candidate, of which a beginning shows nothing.
ANY_GRID: Grid = (1, 2, 2)


@dataclass(frozen=True, slots=True)
class Beginning:
    """The beginning of a question: its words, and the ids of its images, up to the first candidate."""

    words: tuple[str, ...]
    image_ids: tuple[str, ...]


def make_beginning(prompt: Prompt, image_ids: Sequence[str]) -> Beginning:
    """Return the beginning of a prompt whose first images are these."""
    return Beginning(prompt.segments[: len(image_ids) + 1], tuple(image_ids))


class Prefixes:
    """Keys and values by beginning."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, features: VisionFeatures) -> None:
        """``features``: of the beginnings' images, before they are asked for."""
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._features = features
        self._known: OrderedDict[Beginning, KeysAndValues] = OrderedDict()
        self._batcher = Batcher(QUERY_BLOCK, "questions")

    @property
    def kept_bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(one.nbytes for layers in self._known.values() for layer in layers for one in layer)

    def clear(self) -> None:
        """Drop all."""
        self._known.clear()

    def limit_batches(self, tokens: int) -> None:
        """Let no batch have more tokens, unless it is one question."""
        self._batcher.budget = tokens

    def find(self, wanted: Beginning, block: Iterable[Beginning]) -> KeysAndValues:
        """Return the keys and values of ``wanted``; unless known, compute those of its length in ``block`` along.

        ``block`` must be the same whichever of its members is wanted: a batch of other rows rounds differently.
        """
        if wanted not in self._known:
            tokens = self._cut(wanted)
            alike = [own for own in dict.fromkeys(block) if _are_alike(self._cut(own), tokens)] or [wanted]
            for part in self._batcher.run(self._compute, alike, cost=len(tokens.ids)):
                self._known.update(part)
        self._known.move_to_end(wanted)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return self._known[wanted]

    def _cut(self, beginning: Beginning) -> Tokens:
        count = len(beginning.image_ids)
        grids = [self._features[image_id].grid for image_id in beginning.image_ids]
        tokens = self._tokenizer.encode(Prompt((*beginning.words, "")), [*grids, ANY_GRID])
        return tokens.cut(0, tokens.find_image(count))

    def _compute(self, beginnings: Sequence[Beginning]) -> dict[Beginning, KeysAndValues]:
        images = [[self._features[image_id].levels for image_id in own.image_ids] for own in beginnings]
        found = self._decoder.compute_prefixes([self._cut(own) for own in beginnings], images)
        return dict(zip(beginnings, found, strict=True))


def _are_alike(tokens: Tokens, other: Tokens) -> bool:
    """Whether both can be rows of one batch: of one length, with images of the same grids in the same places."""
    return torch.equal(tokens.is_image, other.is_image) and torch.equal(tokens.positions, other.positions)

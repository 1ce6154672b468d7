"""The language part of a question: tokens over stored image features, behind a beginning that is computed once.

A question is its prompt's text with as many image tokens as each image has. What stands before the candidates is
computed once for each query and for a block of queries at a time: one such beginning is a hundred tokens, and alone it
would leave a GPU idle for as long as the candidates take. The candidates' own parts follow as rows of one length.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ...tasks import IMAGE_MARK, format_chat_prompt
from ..questions import Prompt
from .base import QUERY_BLOCK
from .encoder import Batcher, Grid, VisionFeatures


IMAGE_PAD = "<|image_pad|>"
IMAGE_START, IMAGE_END = "<|vision_start|>", "<|vision_end|>"
KEPT_QUESTIONS = 4096

# Beginnings kept: those of two blocks, since the two image orders take turns.
KEPT_BEGINNINGS = 2 * QUERY_BLOCK

# A grid for the first candidate, of which a beginning shows nothing.
ANY_GRID: Grid = (1, 2, 2)
KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A question, or a part of it.

    Attributes:
        ids: [L].
        is_image: [L], where image features go.
        positions: [3, L], in time, height and width (M-RoPE).
    """

    ids: torch.Tensor
    is_image: torch.Tensor
    positions: torch.Tensor

    def cut(self, start: int, end: int | None = None) -> "Tokens":
        """Return the part from ``start`` to ``end``."""
        return Tokens(self.ids[start:end], self.is_image[start:end], self.positions[:, start:end])

    def find_image(self, number: int) -> int:
        """Return where the first token of the ``number``-th image stands."""
        before = torch.cat([self.is_image.new_zeros(1), self.is_image[:-1]])
        return int(torch.nonzero(self.is_image & ~before)[number])


class Tokenizer:
    """Makes tokens of prompts; they depend on the words and the images' grids alone, so those that recur are kept."""

    def __init__(self, model: Any, processor: Any, system_prompt: str) -> None:
        """``model`` gives the positions, ``processor`` the tokens."""
        self.system_prompt = system_prompt
        self.model = model
        self.tokenizer = processor.tokenizer
        self.merged = model.config.vision_config.spatial_merge_size**2
        self._known: dict[tuple[Prompt, tuple[Grid, ...]], Tokens] = {}

    @property
    def kept_bytes(self) -> int:
        """Memory of the tokens kept."""
        return sum(
            part.nbytes for tokens in self._known.values() for part in (tokens.ids, tokens.is_image, tokens.positions)
        )

    def clear(self) -> None:
        """Drop all."""
        self._known.clear()

    def encode(self, prompt: Prompt, grids: Sequence[Grid]) -> Tokens:
        """Return the tokens of a prompt whose images have these grids."""
        key = (prompt, tuple(grids))
        if key not in self._known:
            if len(self._known) >= KEPT_QUESTIONS:
                self._known.clear()
            self._known[key] = self._encode(prompt, grids)
        return self._known[key]

    def _encode(self, prompt: Prompt, grids: Sequence[Grid]) -> Tokens:
        text = IMAGE_MARK.join(prompt.segments)
        for grid in grids:
            pads = IMAGE_PAD * (int(np.prod(grid)) // self.merged)
            text = text.replace(IMAGE_MARK, IMAGE_START + pads + IMAGE_END, 1)
        text = format_chat_prompt(text, self.model.config.model_type, self.system_prompt)
        ids = torch.tensor([self.tokenizer.encode(text, add_special_tokens=False)], device=self.model.device)
        is_image = ids == self.model.config.image_token_id
        positions, _ = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=is_image.int(),
            image_grid_thw=torch.tensor(list(grids), device=ids.device),
        )
        return Tokens(ids[0], is_image[0], positions[:, 0])


class Decoder:
    """Runs the decoder without its output layer."""

    def __init__(self, model: Any) -> None:
        """``model``: one of ``checkpoint.FAMILIES``."""
        self.model = model

    def compute_prefixes(
        self, beginnings: Sequence[Tokens], images: Sequence[Sequence[torch.Tensor]]
    ) -> list[KeysAndValues]:
        """Return each layer's keys and values [1, heads, L, size] of the beginnings of questions.

        Args:
            beginnings: of one length, with images in the same places.
            images: for each the levels of its images, [1 + deepstack levels, visual tokens, width].
        """
        cache = DynamicCache(config=self.model.config)
        self._run(torch.stack([tokens.ids for tokens in beginnings]), beginnings[0], images, cache)
        layers: list[Any] = cache.layers
        rows = [slice(row, row + 1) for row in range(len(beginnings))]
        return [[(layer.keys[row], layer.values[row]) for layer in layers] for row in rows]

    def compute_last(
        self, tokens: Tokens, rows: Sequence[Sequence[torch.Tensor]], prefix: KeysAndValues | None = None
    ) -> torch.Tensor:
        """Return the last token's hidden state of each row, fp32 [rows, width].

        Args:
            tokens: what all rows have in common but for their images: after the prefix, if there is one.
            rows: each row's images.
            prefix: of ``compute_prefixes``, common to the rows.
        """
        cache = None
        if prefix is not None:
            cache = DynamicCache(config=self.model.config)
            for layer, (keys, values) in enumerate(prefix):
                cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
        ids = tokens.ids[None].expand(len(rows), -1)
        return self._run(ids, tokens, rows, cache)[:, -1].float()

    def _run(
        self, ids: torch.Tensor, layout: Tokens, rows: Sequence[Sequence[torch.Tensor]], cache: DynamicCache | None
    ) -> torch.Tensor:
        """Return the hidden states [rows, L, width] of ids [rows, L], whose images lie as in ``layout``."""
        count = len(rows)
        embeds = self.model.get_input_embeddings()(ids)
        images = [image for row in rows for image in row]
        options: dict[str, Any] = {}
        if images:
            levels = torch.cat([image.to(embeds.device) for image in images], dim=1).to(embeds.dtype)
            places = layout.is_image.expand(count, -1)
            embeds[places] = levels[0]
            if len(levels) > 1:
                options = {"visual_pos_masks": places, "deepstack_visual_embeds": list(levels[1:])}
        output = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=layout.positions[:, None].expand(-1, count, -1),
            past_key_values=cache,
            use_cache=cache is not None,
            **options,
        )
        return output.last_hidden_state


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
        while len(self._known) > KEPT_BEGINNINGS:
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

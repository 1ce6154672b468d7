"""A question as tokens: the prompt's text with as many image tokens as each image has, and where they stand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...tasks import IMAGE_MARK, format_chat_prompt
from ..prompts import Prompt
from .vision_features import Grid


IMAGE_PAD = "<|image_pad|>"
IMAGE_START, IMAGE_END = "<|vision_start|>", "<|vision_end|>"
KEPT = 4096


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
            if len(self._known) >= KEPT:
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

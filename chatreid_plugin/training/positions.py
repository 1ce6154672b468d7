"""One position for every image token, in training and in generation.

transformers places image tokens by ``mm_token_type_ids`` (its pull request 43972). LLaMA-Factory 0.9.5 makes them
inside its training collator only: its HF engine (``chat``, ``api``, ``webchat``) and ``predict_with_generate`` pass
none, and ``generate`` then numbers image tokens like words, without a warning. ``ChatReIDPlugin.get_mm_inputs``
therefore hands the marks to whoever generates. This module lets the collator keep them only where it has not turned
them into positions already, so that training's batches stay what they were.
"""

from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import pad

from ..upstream import get_upstream
from .compat import get_function


TOKEN_TYPES = "mm_token_type_ids"


def fit_token_types(batch: dict[str, Any], padding_side: str) -> None:
    """Drop the token types (B, L) of a batch that has position ids; else pad them to its ``input_ids`` (B, padded L).

    LLaMA-Factory pads them to the longest record only, and the ids of training to a multiple of 8.
    """
    types: torch.Tensor = batch.pop(TOKEN_TYPES)
    if "position_ids" in batch:
        return
    missing = batch["input_ids"].shape[1] - types.shape[1]
    batch[TOKEN_TYPES] = pad(types, (missing, 0) if padding_side == "left" else (0, missing))


def extend_collator(module: ModuleType) -> None:
    """Make the collators of ``llamafactory.data.collator`` treat the token types of our templates."""
    collate = get_function(module, "MultiModalDataCollatorForSeq2Seq.__call__")

    @wraps(collate)
    def collate_with_fitted_types(self: Any, features: list[dict[str, Any]]) -> dict[str, Any]:
        # Late: LLaMA-Factory loads its collator before the module that our image plugin extends.
        from .mm_plugin import ChatReIDPlugin

        batch = collate(self, features)
        if isinstance(self.template.mm_plugin, ChatReIDPlugin) and TOKEN_TYPES in batch:
            fit_token_types(batch, self.tokenizer.padding_side)
        return batch

    get_upstream(module, "MultiModalDataCollatorForSeq2Seq").__call__ = collate_with_fitted_types

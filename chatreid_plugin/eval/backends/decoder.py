"""The language part alone: rows of one length over stored image features, behind a prefix that is computed once."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from .tokens import Tokens


KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]


class Decoder:
    """Runs the decoder without its output layer."""

    def __init__(self, model: Any) -> None:
        """``model``: one of ``checkpoint.FAMILIES``."""
        self.model = model

    def compute_prefix(self, tokens: Tokens, images: Sequence[torch.Tensor]) -> KeysAndValues:
        """Return each layer's keys and values [1, heads, L, size] of tokens that begin a question.

        Args:
            tokens: the prefix.
            images: the levels of its images, [1 + deepstack levels, visual tokens, width] each.
        """
        cache = DynamicCache(config=self.model.config)
        self._run(tokens, [images], cache)
        layers: list[Any] = cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    def compute_last(
        self, tokens: Tokens, rows: Sequence[Sequence[torch.Tensor]], prefix: KeysAndValues | None = None
    ) -> torch.Tensor:
        """Return the last token's hidden state of each row, fp32 [rows, width].

        Args:
            tokens: what all rows have in common but for their images: after the prefix, if there is one.
            rows: each row's images.
            prefix: of ``compute_prefix``, common to the rows.
        """
        cache = None
        if prefix is not None:
            cache = DynamicCache(config=self.model.config)
            for layer, (keys, values) in enumerate(prefix):
                cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
        return self._run(tokens, rows, cache)[:, -1].float()

    def _run(self, tokens: Tokens, rows: Sequence[Sequence[torch.Tensor]], cache: DynamicCache | None) -> torch.Tensor:
        count = len(rows)
        embeds = self.model.get_input_embeddings()(tokens.ids).repeat(count, 1, 1)
        images = [image for row in rows for image in row]
        options: dict[str, Any] = {}
        if images:
            levels = torch.cat([image.to(embeds.device) for image in images], dim=1).to(embeds.dtype)
            places = tokens.is_image.expand(count, -1)
            embeds[places] = levels[0]
            if len(levels) > 1:
                options = {"visual_pos_masks": places, "deepstack_visual_embeds": list(levels[1:])}
        output = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=tokens.positions[:, None].expand(-1, count, -1),
            past_key_values=cache,
            use_cache=cache is not None,
            **options,
        )
        return output.last_hidden_state

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

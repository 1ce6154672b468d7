"""Score with a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint, computing nothing twice.

Every image is encoded once. What stands before the candidate in a question is computed once a query; the candidates'
own parts follow in batches of equal length, which need no padding.

The score is the fp32 margin of "Yes" over "No" at the first answer token: log P(Yes) - log P(No). Probabilities
saturate in half precision and tie; margins do not (paper section 4.1 ranks by "response confidence").
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...errors import UpstreamError
from ...eval_settings import EvalSettings
from ...records import ImageRecord
from ...tasks import LETTERS, NO, YES
from ..prompts import IMAGE_PAIR, Prompt, build_choice_prompt, build_pair_prompt
from ..queries import Query
from ..ties import ScoreArray
from .checkpoint import compute_weights_fingerprint, load_checkpoint
from .decoder import Decoder, KeysAndValues
from .memory import Batcher
from .tokens import Tokenizer, Tokens
from .vision_features import Grid, VisionFeatures


class TransformersScorer:
    """Scores pairs by margins; ``prepare`` encodes all images first."""

    confidence: Literal["margins"] = "margins"

    def __init__(self, settings: EvalSettings, image_root: Path) -> None:
        """Load the checkpoint.

        Raises:
            ConfigError: see ``load_checkpoint``.
            UpstreamError: the tokenizer splits "Yes", "No" or a letter.
        """
        self.settings = settings
        self.model, self.processor = load_checkpoint(settings)
        self.fingerprint: dict[str, Any] = {
            "weights": compute_weights_fingerprint(self.model),
            "image_order": settings.image_order,
        }
        on_host = settings.features_on == "host"
        self.features = VisionFeatures(self.model, self.processor, image_root, settings.policy, on_host=on_host)
        self._tokenizer = Tokenizer(self.model, self.processor)
        self._decoder = Decoder(self.model)
        self._batcher = Batcher(settings.batch_size, "pairs")
        yes, no = self._read_rows((YES, NO))
        self._direction = yes - no
        self._letters = self._read_rows(LETTERS)

    def _read_rows(self, words: Sequence[str]) -> torch.Tensor:
        """Return the output layer's rows of some words, [words, width], fp32: all of it that is needed."""
        tokens = [self.processor.tokenizer.encode(word, add_special_tokens=False) for word in words]
        split = [word for word, ids in zip(words, tokens, strict=True) if len(ids) != 1]
        if split:
            raise UpstreamError(f"The tokenizer splits {', '.join(map(repr, split))} into several tokens.")
        return self.model.get_output_embeddings().weight[[ids[0] for ids in tokens]].detach().float()

    def prepare(self, queries: Sequence[Query], gallery: Sequence[ImageRecord]) -> None:
        """Encode the images that are not encoded yet, each file once.

        Raises:
            DataError: a file cannot be decoded.
        """
        self.features.encode([*(query.image for query in queries if query.image is not None), *gallery])

    @torch.inference_mode()
    def pool_images(self, records: Sequence[ImageRecord]) -> ScoreArray:
        """Return each image's vision features, the mean of its tokens (N, width), for ``filter: vlm``."""
        self.prepare([], records)
        pooled = [self.features[record.image_id].levels[0].float().mean(dim=0) for record in records]
        return torch.stack(pooled).cpu().numpy()

    def forget_images(self) -> None:
        """Drop all encoded images, for a server that lives long."""
        self.features.clear()

    @torch.inference_mode()
    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Return the margins (K,), fp32, higher for "the same person", in the order of the candidates.

        With ``image_order: both`` they are the means of the two orders' margins. A question with one image has no
        order.

        Raises:
            ConfigError: the task cannot be asked of the query.
            DataError: an image cannot be decoded.
            UpstreamError: the device has no memory for one pair.
        """
        prompt = build_pair_prompt(query, task)
        self.prepare([query], candidates)
        if task != IMAGE_PAIR or query.image is None:
            return self._score(prompt, [], candidates, 0)
        own = [query.image]
        order = self.settings.image_order
        if order == "query_first":
            return self._score(prompt, own, candidates, 1)
        swapped = self._score(prompt, own, candidates, 0)
        if order == "gallery_first":
            return swapped
        return (self._score(prompt, own, candidates, 1) + swapped) * np.float32(0.5)

    def _score(
        self, prompt: Prompt, own: Sequence[ImageRecord], candidates: Sequence[ImageRecord], place: int
    ) -> ScoreArray:
        """Return the margins with the candidate as the ``place``-th image and the query's images around it."""
        before = [self.features[record.image_id] for record in own[:place]]
        after = [self.features[record.image_id] for record in own[place:]]
        margins = np.empty(len(candidates), dtype=np.float32)
        prefix = None
        for grid, positions in self._bucket(candidates).items():
            tokens = self._tokenizer.encode(prompt, [*(f.grid for f in before), grid, *(f.grid for f in after)])
            # Up to here no candidate has been seen: the same for all grids, too.
            start = tokens.find_image(place)
            if prefix is None:
                prefix = self._decoder.compute_prefix(tokens.cut(0, start), [f.levels for f in before])
            compute = partial(self._compute_margins, tokens.cut(start), prefix, [f.levels for f in after], candidates)
            margins[positions] = torch.cat(self._batcher.run(compute, positions)).cpu().numpy()
        return margins

    def _compute_margins(
        self,
        suffix: Tokens,
        prefix: KeysAndValues,
        after: Sequence[torch.Tensor],
        candidates: Sequence[ImageRecord],
        positions: Sequence[int],
    ) -> torch.Tensor:
        """Return the margins of one batch, those candidates at ``positions``."""
        rows = [[self.features[candidates[position].image_id].levels, *after] for position in positions]
        return self._decoder.compute_last(suffix, rows, prefix) @ self._direction

    def _bucket(self, candidates: Sequence[ImageRecord]) -> dict[Grid, list[int]]:
        """Return grid to positions: candidates of one grid make sequences of one length, which need no padding."""
        buckets: dict[Grid, list[int]] = defaultdict(list)
        for position, record in enumerate(candidates):
            buckets[self.features[record.image_id].grid].append(position)
        return buckets

    @torch.inference_mode()
    def choose(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Return the logits (N,), fp32, of the candidates' letters at the first answer token.

        Raises:
            ConfigError: the task has no letters.
            DataError: more candidates than letters, or an image cannot be decoded.
            UpstreamError: the device has no memory for the question.
        """
        count = len(candidates)
        prompt = build_choice_prompt(query, task, count)
        self.prepare([query], candidates)
        own = [query.image] if query.image is not None and prompt.image_count > count else []
        images = [self.features[record.image_id] for record in (*own, *candidates)]
        tokens = self._tokenizer.encode(prompt, [image.grid for image in images])

        row = [image.levels for image in images]
        (hidden,) = Batcher(1, "questions").run(partial(self._decoder.compute_last, tokens), [row])
        return (hidden[0] @ self._letters[:count].T).cpu().numpy()

"""Score with a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint, computing nothing twice.

Every image is encoded once. What stands before the candidates in a question is computed once a query; the candidates'
own parts follow in batches of equal length, which need no padding.

The score is the fp32 margin of "Yes" over "No" at the first answer token: log P(Yes) - log P(No). Probabilities
saturate in half precision and tie; margins do not (paper section 4.1 ranks by "response confidence").
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from ...archives import ScoreArray
from ...datasets.benchmark import Query
from ...errors import UpstreamError
from ...records import ImageRecord
from ...tasks import LETTERS, NO, YES
from ...vision_tower import speed_up_vision_tower
from ..questions import IMAGE_PAIR, SHOWS_QUERY, Prompt, build_choice_prompt, build_pair_prompt, can_ask
from ..settings import ModelSettings
from .base import QUERY_BLOCK
from .checkpoint import Checkpoint, find_system_prompt, load_checkpoint
from .decoder import Beginning, Decoder, KeysAndValues, Prefixes, Tokenizer, Tokens, make_beginning
from .encoder import Batcher, Grid, VisionFeatures


# Of the vision towers: 28x28 (Qwen2-VL, Qwen2.5-VL) or 32x32.
PIXELS_PER_TOKEN = 28 * 28
ImageOrder = Literal["query_first", "gallery_first", "both"]

logger = logging.getLogger(__name__)


class TransformersScorer:
    """Scores pairs by margins; ``prepare`` encodes all images first."""

    confidence: Literal["margins"] = "margins"
    filled = 0

    def __init__(
        self,
        settings: ModelSettings,
        image_root: Path,
        image_order: ImageOrder = "query_first",
        loaded: Checkpoint | None = None,
    ) -> None:
        """Take a checkpoint, or load it.

        Args:
            settings: the checkpoint and its image policy.
            image_root: where the images are.
            image_order: of the question on two images alone; see ``score_pairs``.
            loaded: the checkpoint of the settings; it may be another scorer's, too.

        Raises:
            ConfigError: see ``load_checkpoint``.
            UpstreamError: the tokenizer splits "Yes", "No" or a letter.
        """
        loaded = loaded or load_checkpoint(settings)
        self.model, self.processor = loaded.model, loaded.processor
        self._image_order = image_order
        _speed_up_vision_tower(self.model)
        self.system_prompt = find_system_prompt(settings, self.model.config.model_type)
        self.fingerprint: dict[str, Any] = {
            "weights": loaded.weights,
            "configuration": loaded.configuration,
            "image_order": image_order,
            "system_prompt": self.system_prompt,
        }
        on_host = settings.features_on == "host"
        self.features = VisionFeatures(self.model, self.processor, image_root, settings.policy, on_host=on_host)
        self._tokenizer = Tokenizer(self.model, self.processor, self.system_prompt)
        self._decoder = Decoder(self.model)
        self._prefixes = Prefixes(self._decoder, self._tokenizer, self.features)
        self._blocks: dict[str, Sequence[Query]] = {}
        self._batcher = Batcher(settings.batch_size, "questions")
        yes, no = self._read_rows((YES, NO))
        self._direction = (yes - no)[None]
        self._letters = self._read_rows(LETTERS)

    def _read_rows(self, words: Sequence[str]) -> torch.Tensor:
        """Return the output layer's rows of some words, [words, width], fp32: all of it that is needed."""
        tokens = [self.processor.tokenizer.encode(word, add_special_tokens=False) for word in words]
        split = [word for word, ids in zip(words, tokens, strict=True) if len(ids) != 1]
        if split:
            raise UpstreamError(f"The tokenizer splits {', '.join(map(repr, split))} into several tokens.")
        return self.model.get_output_embeddings().weight[[ids[0] for ids in tokens]].detach().float()

    def prepare(
        self, queries: Sequence[Query], gallery: Sequence[ImageRecord], planned: Sequence[ImageRecord] = ()
    ) -> None:
        """Encode the images that are not encoded yet, each file once.

        Raises:
            DataError: a file cannot be decoded.
        """
        blocks = [queries[start : start + QUERY_BLOCK] for start in range(0, len(queries), QUERY_BLOCK)]
        self._blocks = {query.query_id: block for block in blocks for query in block}
        self.features.arrange(planned)
        self._encode(queries, gallery)

    def _encode(self, queries: Sequence[Query], gallery: Sequence[ImageRecord]) -> None:
        self.features.encode([*(query.image for query in queries if query.image is not None), *gallery])

    @torch.inference_mode()
    def pool_images(self, records: Sequence[ImageRecord], planned: Sequence[ImageRecord] = ()) -> ScoreArray:
        """Return each image's vision features, the mean of its tokens (N, width), for ``filter: vlm``.

        ``planned`` are those of all processes, in the same order in each.
        """
        self.features.arrange(planned)
        self._encode([], records)
        return self._pool(records)

    def pool_apart(self, records: Sequence[ImageRecord]) -> ScoreArray:
        """Return the same (N, width) of images that are not scored, so that nothing of them is kept."""
        batches, pooled = self.features.form_batches(records), dict[str, ScoreArray]()
        with tqdm(total=sum(map(len, batches)), desc="training images", unit="image") as progress:
            for batch, features in self.stream_pooled(batches):
                pooled |= zip((record.image_id for record in batch), features, strict=True)
                progress.update(len(batch))
        return np.stack([pooled[record.image_id] for record in records])

    def stream_pooled(
        self, batches: Sequence[Sequence[ImageRecord]]
    ) -> Iterator[tuple[Sequence[ImageRecord], ScoreArray]]:
        """Yield batches of ``features.form_batches`` with their pooled features (N, width); none is kept."""
        for batch in self.features.stream(batches):
            yield batch, self._pool(batch)

    def _pool(self, records: Sequence[ImageRecord]) -> ScoreArray:
        pooled = [self.features[record.image_id].levels[0].float().mean(dim=0) for record in records]
        return torch.stack(pooled).cpu().numpy()

    @property
    def kept_bytes(self) -> int:
        """Memory of encoded images, beginnings of questions and tokens, for a server that lives long."""
        return self.features.kept_bytes + self._prefixes.kept_bytes + self._tokenizer.kept_bytes

    def limit_batches(self, tokens: int) -> None:
        """Let no step of the vision tower or the decoder have more tokens, unless it is one image or question."""
        self.features.limit_batches(tokens * PIXELS_PER_TOKEN)
        self._prefixes.limit_batches(tokens)
        self._batcher.budget = tokens

    def forget_images(self) -> None:
        """Drop all encoded images and what was made with them."""
        self.features.clear()
        self._prefixes.clear()
        self._tokenizer.clear()
        self._blocks.clear()

    @torch.inference_mode()
    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Return the margins (K,), fp32, higher for "the same person", in the order of the candidates.

        With ``image_order: both`` they are the means of the two orders' margins. Only the question on two images alone
        can be asked in either order.

        Raises:
            ConfigError: the task cannot be asked of the query.
            DataError: an image cannot be decoded.
            UpstreamError: the device has no memory for one pair.
        """
        self._encode([query], candidates)
        ask = partial(self._score_pairs, query, candidates, task)
        order = self._image_order
        if task != IMAGE_PAIR or order == "query_first":
            return ask(shown_first=task in SHOWS_QUERY)
        swapped = ask(shown_first=False)
        return swapped if order == "gallery_first" else (ask(shown_first=True) + swapped) * np.float32(0.5)

    def _score_pairs(
        self, query: Query, candidates: Sequence[ImageRecord], task: str, *, shown_first: bool
    ) -> ScoreArray:
        """Return the margins (K,); ``shown_first``: the query's image comes before the candidate's."""

        def begin(own: Query) -> Beginning:
            shown = [own.image.image_id] if shown_first and own.image is not None else []
            return make_beginning(build_pair_prompt(own, task), shown)

        after = [query.image] if task == IMAGE_PAIR and not shown_first and query.image is not None else []
        block = (begin(own) for own in self._blocks.get(query.query_id, ()) if can_ask(own, task))
        rows = [[record, *after] for record in candidates]
        return self._ask(build_pair_prompt(query, task), begin(query), block, rows, self._direction)[:, 0]

    @torch.inference_mode()
    def choose(self, query: Query, windows: Sequence[Sequence[ImageRecord]], task: str) -> list[ScoreArray]:
        """Return the logits (N,), fp32, of each window's letters at the first answer token.

        Raises:
            ConfigError: the task has no letters.
            DataError: more candidates than letters, or an image cannot be decoded.
            UpstreamError: the device has no memory for a question.
        """
        self._encode([query], [record for window in windows for record in window])
        results: dict[int, ScoreArray] = {}
        for count in {len(window) for window in windows}:  # the words depend on it
            prompt = build_choice_prompt(query, task, count)
            own = [query.image.image_id] if query.image is not None and prompt.image_count > count else []
            places = [place for place, window in enumerate(windows) if len(window) == count]
            rows = [windows[place] for place in places]
            letters = self._letters[:count]
            results |= zip(places, self._ask(prompt, make_beginning(prompt, own), (), rows, letters), strict=True)
        return [results[place] for place in range(len(windows))]

    def _ask(
        self,
        prompt: Prompt,
        beginning: Beginning,
        block: Iterable[Beginning],
        rows: Sequence[Sequence[ImageRecord]],
        weights: torch.Tensor,
    ) -> ScoreArray:
        """Return what rows [N, width] of the output layer give at the first answer token of each question, (R, N).

        Args:
            prompt: the words of all questions.
            beginning: what they have in common.
            block: see ``Prefixes.find``.
            rows: each question's other images.
            weights: rows of the output layer, or sums of them.
        """
        results = np.empty((len(rows), len(weights)), dtype=np.float32)
        own = [self.features[image_id].grid for image_id in beginning.image_ids]
        for grids, positions in self._bucket(rows).items():
            tokens = self._tokenizer.encode(prompt, [*own, *grids])
            suffix = tokens.cut(tokens.find_image(len(own)))
            prefix = self._prefixes.find(beginning, block)
            compute = partial(self._compute_rows, suffix, prefix, rows, weights)
            found = self._batcher.run(compute, positions, cost=len(tokens.ids), weight=len(grids))
            results[positions] = torch.cat(found).cpu().numpy()
        return results

    def _compute_rows(
        self,
        suffix: Tokens,
        prefix: KeysAndValues,
        rows: Sequence[Sequence[ImageRecord]],
        weights: torch.Tensor,
        positions: Sequence[int],
    ) -> torch.Tensor:
        """Return [batch, N] for one batch, the questions at ``positions``."""
        images = [[self.features[record.image_id].levels for record in rows[position]] for position in positions]
        return self._decoder.compute_last(suffix, images, prefix) @ weights.T

    def _bucket(self, rows: Sequence[Sequence[ImageRecord]]) -> dict[tuple[Grid, ...], list[int]]:
        """Return grids to positions: rows of the same grids make sequences of one length, which need no padding."""
        buckets: dict[tuple[Grid, ...], list[int]] = defaultdict(list)
        for position, row in enumerate(rows):
            buckets[tuple(self.features[record.image_id].grid for record in row)].append(position)
        return buckets


def _speed_up_vision_tower(model: Any) -> None:
    """Batch the attention over images, once for a model that several scorers share."""
    try:
        speed_up_vision_tower(model)
    except UpstreamError as error:
        logger.warning("The vision tower attends to one image at a time, as transformers does it: %s", error)

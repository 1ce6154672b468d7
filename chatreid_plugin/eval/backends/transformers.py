"""Score pairs with a Qwen2-VL checkpoint: every image is encoded once, then only the decoder runs for each pair.

The score is the fp32 margin of "Yes" over "No" at the first answer token: log P(Yes) - log P(No). Probabilities
saturate in half precision and tie; margins do not (paper section 4.1 ranks by "response confidence").
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from tqdm import tqdm

from ...crops import open_crop, prepare_crop
from ...errors import ConfigError, UpstreamError
from ...eval_settings import EvalSettings
from ...records import ImageRecord
from ...tasks import IMAGE_MARK, NO, YES, format_chat_prompt
from ..prompts import IMAGE_PAIR, build_pair_prompt
from ..queries import Query


IMAGE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"
ENCODE_BATCH = 32
HASHED_BYTES = 1 << 20


def load_checkpoint(settings: EvalSettings) -> tuple[Any, Any]:
    """Return (model in evaluation mode on its device, processor).

    Raises:
        ConfigError: the checkpoint is missing, has no weights or is no Qwen2-VL.
    """
    from transformers import AutoConfig, AutoProcessor, Qwen2VLForConditionalGeneration

    name = str(settings.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "qwen2_vl":
            raise ConfigError(f"model_name_or_path: {name} is a {config.model_type}; this backend scores qwen2_vl.")
        model: Any = Qwen2VLForConditionalGeneration.from_pretrained(name, dtype=settings.dtype)
        processor: Any = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model_name_or_path: {name} cannot be loaded: {error}") from None
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), processor


def compute_weights_fingerprint(model: Any) -> str:
    """Return a hash over every tensor's name, shape and first megabyte of content."""
    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        raw = tensor.detach().flatten().view(torch.uint8)[:HASHED_BYTES]
        digest.update(raw.cpu().numpy().tobytes())
    return digest.hexdigest()


class TransformersScorer:
    """Scores pairs by margins; ``prepare`` encodes all images first."""

    confidence: Literal["margins"] = "margins"

    def __init__(self, settings: EvalSettings, image_root: Path) -> None:
        """Load the checkpoint.

        Raises:
            ConfigError: see ``load_checkpoint``.
            UpstreamError: the tokenizer splits "Yes" or "No".
        """
        self.settings = settings
        self.image_root = image_root
        self.model, self.processor = load_checkpoint(settings)
        self.fingerprint: dict[str, Any] = {"weights": compute_weights_fingerprint(self.model)}
        self._features: dict[str, torch.Tensor] = {}
        self._grids: dict[str, tuple[int, ...]] = {}
        self._prompts: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[torch.Tensor, ...]] = {}
        answers = [self.processor.tokenizer.encode(word, add_special_tokens=False) for word in (YES, NO)]
        if any(len(ids) != 1 for ids in answers):
            raise UpstreamError(f"The tokenizer splits {YES!r} or {NO!r} into several tokens: {answers}.")
        # Two rows of the output layer are all that is needed, in fp32.
        rows = self.model.lm_head.weight[[answers[0][0], answers[1][0]]].detach().float()
        self._direction = rows[0] - rows[1]

    @torch.inference_mode()
    def prepare(self, queries: Sequence[Query], gallery: Sequence[ImageRecord]) -> None:
        """Encode the images that are not encoded yet, each file once.

        Raises:
            DataError: a file cannot be decoded.
        """
        records = [*(query.image for query in queries if query.image is not None), *gallery]
        pending = list({r.image_id: r for r in records if r.image_id not in self._features}.values())
        if not pending:
            return
        # No bar for the few new images of one query, or of one request to a server.
        few = len(pending) <= 2 * ENCODE_BATCH
        with tqdm(total=len(pending), desc="encoding images", unit="image", disable=few) as progress:
            for start in range(0, len(pending), ENCODE_BATCH):
                self._encode(pending[start : start + ENCODE_BATCH])
                progress.update(len(pending[start : start + ENCODE_BATCH]))

    def _encode(self, records: Sequence[ImageRecord]) -> None:
        crops = [prepare_crop(open_crop(self.image_root / r.path), self.settings.policy) for r in records]
        inputs = self.processor.image_processor(images=crops, return_tensors="pt").to(self.model.device)
        features = self.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        for record, vector, grid in zip(records, features, inputs["image_grid_thw"].tolist(), strict=True):
            self._features[record.image_id] = vector
            self._grids[record.image_id] = tuple(grid)

    def forget_images(self) -> None:
        """Drop all encoded images, for a server that lives long."""
        self._features.clear()
        self._grids.clear()

    def choose(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> npt.NDArray[np.float32]:
        """Not there yet."""
        raise ConfigError("mode: choice is not offered by this backend.")

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> npt.NDArray[np.float32]:
        """Return the margins (K,), fp32, higher for "the same person", in the order of the candidates."""
        if query.image is None or task != IMAGE_PAIR:
            raise ConfigError(f"This backend scores image queries; {query.query_id} asks {task}.")
        self.prepare([query], candidates)
        margins = np.empty(len(candidates), dtype=np.float32)
        for grid, positions in self._bucket(candidates):
            for start in range(0, len(positions), self.settings.batch_size):
                part = positions[start : start + self.settings.batch_size]
                margins[part] = self._score_batch(query, query.image, [candidates[i] for i in part], grid)
        return margins

    def _bucket(self, candidates: Sequence[ImageRecord]) -> Iterator[tuple[tuple[int, ...], list[int]]]:
        """Yield (grid, positions): candidates of one grid make sequences of one length, which need no padding."""
        buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for position, record in enumerate(candidates):
            buckets[self._grids[record.image_id]].append(position)
        yield from buckets.items()

    def _make_prompt(self, query: Query, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """Return token ids (1, L), which of them are image tokens (1, L), and position ids (3, 1, L) of a pair.

        They depend on the two images' grids alone, so the few that occur are kept.
        """
        if (first, second) in self._prompts:
            return self._prompts[first, second]
        pair = build_pair_prompt(query, IMAGE_PAIR)
        text = format_chat_prompt(IMAGE_MARK.join(pair.segments))
        merge = self.model.config.vision_config.spatial_merge_size**2
        for grid in (first, second):
            tokens = IMAGE_TOKENS.replace("<|image_pad|>", "<|image_pad|>" * (int(np.prod(grid)) // merge))
            text = text.replace(IMAGE_MARK, tokens, 1)
        ids = self.processor.tokenizer.encode(text, add_special_tokens=False)
        input_ids = torch.tensor([ids], device=self.model.device)
        is_image = input_ids == self.model.config.image_token_id
        position_ids, _ = self.model.model.get_rope_index(
            input_ids,
            mm_token_type_ids=is_image.int(),
            image_grid_thw=torch.tensor([first, second], device=input_ids.device),
        )
        self._prompts[first, second] = input_ids, is_image, position_ids
        return self._prompts[first, second]

    @torch.inference_mode()
    def _score_batch(
        self, query: Query, image: ImageRecord, candidates: Sequence[ImageRecord], grid: tuple[int, ...]
    ) -> npt.NDArray[np.float32]:
        input_ids, is_image, position_ids = self._make_prompt(query, self._grids[image.image_id], grid)
        count = len(candidates)
        first = self._features[image.image_id].expand(count, -1, -1)
        second = torch.stack([self._features[record.image_id] for record in candidates])
        embeds = self.model.get_input_embeddings()(input_ids).repeat(count, 1, 1)
        embeds[is_image.expand(count, -1)] = torch.cat([first, second], 1).flatten(0, 1).to(embeds.dtype)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, position_ids=position_ids.expand(-1, count, -1), use_cache=False
        ).last_hidden_state[:, -1]
        return (hidden.float() @ self._direction).cpu().numpy()

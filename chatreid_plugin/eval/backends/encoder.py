"""What the vision tower makes of each image, computed once and kept; in smaller batches where memory is short.

Memory: tokens x width x bytes an image, for Qwen2-VL-2B at 256x128 pixels 45 x 1536 x 2 = 138 kB in bf16: 3.2 GB for
Market-1501 (23,100 images), 13 GB for MSMT17 (93,820). Qwen3-VL's three deepstack levels make it four times as much.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from tqdm import tqdm

from ...errors import UpstreamError
from ...images import ImagePolicy, resize_by_policy
from ...pixels import open_crop, prepare_crop
from ...records import ImageRecord
from .base import StoredFeature


# What it says when an allocator other than CUDA's fails: the host's, the driver's, cuBLAS's.
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
Grid = tuple[int, int, int]
ENCODE_BATCH = 32
BATCHES_AHEAD = 8
DECODE_THREADS = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class VisionFeature:
    """One image.

    Attributes:
        grid: patches in time, height and width.
        levels: [1 + deepstack levels, visual tokens, width]; first what is put in the image tokens' places.
    """

    grid: Grid
    levels: torch.Tensor


class VisionFeatures:
    """Features by image id.

    Attributes:
        read_image: opens an image; set anew where it is no file.
        kept_bytes: memory of the features.
    """

    def __init__(self, model: Any, processor: Any, image_root: Path, policy: ImagePolicy, *, on_host: bool) -> None:
        """``on_host``: keep them in the host's memory rather than the model's device's."""
        self.model = model
        self.processor = processor
        # A server has its images in memory.
        self.read_image: Callable[[ImageRecord], Image.Image] = lambda record: open_crop(image_root / record.path)
        self.policy = policy
        self.device = torch.device("cpu") if on_host else model.device
        self._known: dict[str, VisionFeature] = {}
        self._batches: dict[str, list[ImageRecord]] = {}
        self._batcher = Batcher(ENCODE_BATCH, "images")
        self.kept_bytes = 0

    def __getitem__(self, image_id: str) -> VisionFeature:
        return self._known[image_id]

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._known

    def __len__(self) -> int:
        return len(self._known)

    def store(self, image_id: str) -> StoredFeature:
        """Return an image's features as bytes."""
        found = self._known[image_id]
        content = found.levels.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return StoredFeature(found.grid, tuple(found.levels.shape), content)

    def restore(self, image_id: str, stored: StoredFeature) -> None:
        """Take an image's features from bytes that the same model has made; they are not encoded any more then."""
        levels = torch.frombuffer(bytearray(stored.content), dtype=self.model.dtype).reshape(stored.shape)
        self._known[image_id] = VisionFeature(stored.grid, levels.to(self.device))
        self.kept_bytes += levels.nbytes

    def clear(self) -> None:
        """Drop all."""
        self._known.clear()
        self._batches.clear()
        self.kept_bytes = 0

    def limit_batches(self, pixels: int) -> None:
        """Let no batch have more pixels, unless it is one image."""
        self._batcher.budget = pixels

    def arrange(self, planned: Sequence[ImageRecord]) -> None:
        """Fix the batches of images that are in none yet; what is planned must be the same in every process and run.

        Half precision rounds differently in a batch of other images, and what is left to do differs.
        """
        for batch in self.form_batches([r for r in planned if r.image_id not in self._batches]):
            self._batches |= {record.image_id: batch for record in batch}

    def form_batches(self, records: Sequence[ImageRecord]) -> list[list[ImageRecord]]:
        """Return batches of one prepared size, in the order given."""
        sizes: dict[tuple[int, int], dict[str, ImageRecord]] = defaultdict(dict)
        for record in records:
            known = record.width and record.height  # a server's pictures have none
            size = resize_by_policy(record.width, record.height, self.policy) if known else (0, 0)
            sizes[size][record.image_id] = record
        alike = [list(found.values()) for _, found in sorted(sizes.items())]
        return [own[start : start + ENCODE_BATCH] for own in alike for start in range(0, len(own), ENCODE_BATCH)]

    def encode(self, records: Sequence[ImageRecord]) -> None:
        """Encode the images that are not known yet, each once, and the others of their batches.

        Raises:
            DataError: a file cannot be decoded.
            UpstreamError: the device has no memory for one image.
        """
        pending = [record for record in records if record.image_id not in self._known]
        arranged = [self._batches[record.image_id] for record in pending if record.image_id in self._batches]
        batches = list({batch[0].image_id: batch for batch in arranged}.values())
        batches += self.form_batches([record for record in pending if record.image_id not in self._batches])
        count = sum(map(len, batches))
        # No bar for the few new images of one query, or of one request to a server.
        few = count <= 2 * ENCODE_BATCH
        with tqdm(total=count, desc="encoding images", unit="image", disable=few) as progress:
            for batch in self._encode_batches(batches):
                progress.update(len(batch))

    def stream(self, batches: Sequence[Sequence[ImageRecord]]) -> Iterator[Sequence[ImageRecord]]:
        """Encode batches of ``form_batches`` and yield each, to be looked up before the next one; then it is dropped.

        Raises:
            DataError, UpstreamError: see ``encode``.
        """
        for batch in self._encode_batches(batches):
            yield batch
            for record in batch:
                self.kept_bytes -= self._known.pop(record.image_id).levels.nbytes

    def _encode_batches(self, batches: Sequence[Sequence[ImageRecord]]) -> Iterator[Sequence[ImageRecord]]:
        """Encode batch after batch, while threads decode those to come; yield each as it is known."""
        chunks = [batches[start : start + BATCHES_AHEAD] for start in range(0, len(batches), BATCHES_AHEAD)]
        if not chunks:
            return
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            following = self._submit(pool, chunks[0])
            for number, chunk in enumerate(chunks):
                crops = [[future.result() for future in batch] for batch in following]
                # Decoded while this chunk is encoded.
                following = self._submit(pool, chunks[number + 1] if number + 1 < len(chunks) else [])
                for batch, decoded in zip(chunk, crops, strict=True):
                    self._encode_batch(batch, decoded)
                    yield batch

    def _submit(
        self, pool: ThreadPoolExecutor, batches: Sequence[Sequence[ImageRecord]]
    ) -> list[list[Future[Image.Image]]]:
        return [[pool.submit(self._decode, record) for record in batch] for batch in batches]

    def _decode(self, record: ImageRecord) -> Image.Image:
        return prepare_crop(self.read_image(record), self.policy)

    @torch.inference_mode()
    def _encode_batch(self, records: Sequence[ImageRecord], crops: Sequence[Image.Image]) -> None:
        sizes: dict[tuple[int, int], list[tuple[ImageRecord, Image.Image]]] = defaultdict(list)
        for record, crop in zip(records, crops, strict=True):
            sizes[crop.size].append((record, crop))  # should a manifest be wrong about one
        for (width, height), items in sizes.items():
            self._batcher.run(self._encode_equal, items, cost=width * height)

    def _encode_equal(self, items: Sequence[tuple[ImageRecord, Image.Image]]) -> None:
        """Encode crops of one size."""
        inputs = self.processor.image_processor(images=[crop for _, crop in items], return_tensors="pt")
        grids: list[list[int]] = inputs["image_grid_thw"].tolist()
        inputs = inputs.to(self.model.device)
        output = self.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        first = torch.cat(list(output.pooler_output))
        levels = torch.stack([first, *(getattr(output, "deepstack_features", None) or ())])
        # Copied, since a view would keep the whole batch.
        parts = levels.to(self.model.dtype).to(self.device).chunk(len(items), dim=1)
        for (record, _), (time, height, width), part in zip(items, grids, parts, strict=True):
            self._known[record.image_id] = VisionFeature((time, height, width), part.clone())
            self.kept_bytes += part.nbytes


class Batcher:
    """Hands items on in batches, smaller ones after an out-of-memory error.

    What did not fit bounds the cost of later batches, not their number of items: after three huge images the small
    ones still go 64 at a time, and what fits 50 times is not tried 100 times for every query.

    Attributes:
        size: most of a batch, a sum of weights.
        budget: most of a batch, a sum of costs; half of the smallest that did not fit.
    """

    def __init__(self, size: int, what: str) -> None:
        """``what``: the items' name in the error."""
        self.size = size
        self.what = what
        self.budget = math.inf

    def run(
        self, compute: Callable[[Sequence[Item]], Result], items: Sequence[Item], *, cost: int, weight: int = 1
    ) -> list[Result]:
        """Return the results of all batches, in order.

        Args:
            compute: makes one batch's result.
            items: all of one cost and weight.
            cost: what an item takes of memory, roughly: its tokens or pixels.
            weight: how many of ``size`` an item counts as.

        Raises:
            UpstreamError: not even one item fits.
        """
        results: list[Result] = []
        start = 0
        while start < len(items):
            part = items[start : start + max(1, int(min(self.size / weight, self.budget / cost)))]
            try:
                results.append(compute(part))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            else:
                start += len(part)
                continue
            # Out of the handler: the error's traceback held the tensors of the batch.
            self._reduce(len(part), cost, reason)
        return results

    def _reduce(self, tried: int, cost: int, reason: str) -> None:
        if tried == 1:
            raise UpstreamError(
                f"The device has no memory for one of the {self.what}: {reason} Use a smaller image_max_pixels, "
                "dtype: bfloat16, features_on: host, or a device with more memory."
            )
        self.budget = tried // 2 * cost
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host has no memory left; the host's allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)

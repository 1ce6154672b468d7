"""Fewer rows a batch when the device's memory does not hold them."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ...errors import UpstreamError


Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher:
    """Hands items on in batches; each out-of-memory error halves the next ones, for good.

    Attributes:
        size: of the next batch, a sum of weights.
    """

    def __init__(self, size: int, what: str) -> None:
        """``what``: the items' name in the error."""
        self.size = size
        self.what = what

    def run(self, compute: Callable[[Sequence[Item]], Result], items: Sequence[Item], weight: int = 1) -> list[Result]:
        """Return the results of all batches, in order; each item has this weight.

        Raises:
            UpstreamError: not even one item fits.
        """
        results: list[Result] = []
        start = 0
        while start < len(items):
            part = items[start : start + max(1, self.size // weight)]
            try:
                results.append(compute(part))
            except torch.OutOfMemoryError as error:
                reason = str(error)
            else:
                start += len(part)
                continue
            # Out of the handler: the error's traceback held the tensors of the batch.
            self._halve(len(part), weight, reason)
        return results

    def _halve(self, tried: int, weight: int, reason: str) -> None:
        if tried == 1:
            raise UpstreamError(
                f"The device has no memory for one of the {self.what}: {reason} Use a smaller image_max_pixels, "
                "dtype: bfloat16, features_on: host, or a device with more memory."
            )
        self.size = tried // 2 * weight
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

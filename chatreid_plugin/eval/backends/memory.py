"""Fewer rows a batch when the device's memory does not hold them."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ...errors import UpstreamError


# What it says when an allocator other than CUDA's fails: the host's, the driver's, cuBLAS's.
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host has no memory left; the host's allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


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

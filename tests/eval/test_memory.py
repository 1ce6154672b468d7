"""Batches shrink when memory runs out, by what the items cost, and one error says so when nothing fits."""

from collections.abc import Callable, Sequence

import pytest
import torch

from chatreid_plugin.errors import UpstreamError
from chatreid_plugin.eval.backends.encoder import Batcher


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
    MemoryError(),
]


def make_compute(room: int, cost: int, tried: list[int], error: BaseException = ERRORS[0]) -> Callable[..., list[int]]:
    def compute(items: Sequence[int]) -> list[int]:
        tried.append(len(items))
        if len(items) * cost > room:
            raise error
        return list(items)

    return compute


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_halves_and_goes_on_when_memory_runs_out(error: BaseException) -> None:
    tried: list[int] = []
    results = Batcher(8, "rows").run(make_compute(2, 1, tried, error), list(range(11)), cost=1)
    assert sum(results, []) == list(range(11))
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1]
    with pytest.raises(UpstreamError, match=r"no memory for one of the rows.*features_on: host"):
        Batcher(8, "rows").run(make_compute(0, 1, [], error), [1, 2], cost=1)


def test_small_items_keep_their_batches_when_a_few_large_ones_do_not_fit() -> None:
    batcher, tried = Batcher(64, "rows"), list[int]()
    batcher.run(make_compute(10_000, 5_000, tried), [1, 2, 3], cost=5_000)
    batcher.run(make_compute(10_000, 50, tried), list(range(100)), cost=50)
    batcher.run(make_compute(10_000, 5_000, tried), [1, 2, 3], cost=5_000)
    assert tried == [3, 1, 1, 1, 64, 36, 1, 1, 1]


def test_what_did_not_fit_is_not_tried_again_for_the_next_query() -> None:
    batcher, tried = Batcher(128, "rows"), list[int]()
    for _ in range(3):
        batcher.run(make_compute(70, 1, tried), list(range(100)), cost=1)
    assert tried == [100, 50, 50] + [50, 50] * 2


def test_weights_fill_a_batch() -> None:
    tried: list[int] = []
    Batcher(8, "rows").run(make_compute(99, 1, tried), list(range(5)), cost=1, weight=3)
    assert tried == [2, 2, 1]


def test_another_error_goes_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        Batcher(8, "rows").run(make_compute(0, 1, [], RuntimeError("shapes differ")), [1, 2], cost=1)

"""Several processes under torchrun, on one machine or many: who this one is, and how their results meet.

One process needs none of it, and torch is not loaded. Queries are shared out in contiguous blocks, since neighbours
(images of one identity) have many candidates in common and each process encodes the images it needs.
"""

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar


Value = TypeVar("Value")

# A process that is done waits for the slowest; torchrun ends all of them when one fails.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Processes:
    """This process (``rank``, from 0) among ``count``; the first one writes the results."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process merges and writes."""
        return self.rank == 0

    def take_share(self, items: Sequence[Value]) -> Sequence[Value]:
        """Return this process's block of the items; the blocks differ by one item at most."""
        return items[len(items) * self.rank // self.count : len(items) * (self.rank + 1) // self.count]

    def gather(self, value: Value) -> list[Value]:
        """Return every process's value, in order of rank, in every process; all have to call it."""
        if self.count == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return once every process has called it."""
        self.gather(None)


def is_first_process() -> bool:
    """Whether this is the first of torchrun's processes, or the only one; before they have joined."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join_processes() -> Generator[Processes, None, None]:
    """Yield this process's place among those that torchrun started (RANK, WORLD_SIZE), or a single one without it.

    They talk over gloo, which needs no GPU; what they exchange is small (scores, features of a baseline).
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    import torch
    import torch.distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(torch.distributed.get_rank(), count)
    finally:
        torch.distributed.destroy_process_group()

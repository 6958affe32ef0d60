"""Data-parallel training under ``torchrun``: one process a GPU, or several on CPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Workers:
    """The processes that train one network together.

    Attributes:
        device: Of this process.
        rank: Number of this process, from 0.
        count: How many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that measures, writes and speaks."""
        return self.rank == 0

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Wrap ``model`` so that its gradients are averaged over the processes.

        Batch-norm statistics are those of the first process; each normalises its own images.
        """
        return DistributedDataParallel(model) if self.count > 1 else model

    def share_of(self, start: int, stop: int) -> slice:
        """Return this process's rows of a batch ``start … stop``, whose size ``count`` divides."""
        share = (stop - start) // self.count
        return slice(start + self.rank * share, start + (self.rank + 1) * share)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``values`` over all processes."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values


@contextlib.contextmanager
def join_workers(device: str) -> Iterator[Workers]:
    """Join the processes that ``torchrun`` started; without it, be the only one.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``; each process takes the GPU of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Workers(torch.device(device))
        return
    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Workers(place, distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()

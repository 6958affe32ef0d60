"""The processes of a run under ``torchrun``: rank, share of the images, exchange of results.

Every process runs the same code on its share of the images and gathers the results of the others;
only the first prints and writes. Without ``torchrun`` there is one process.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from common.command.cli import EXIT_FAILED, EXIT_INTERRUPTED, UserError, log

# A process that ends is noticed at once; the timeout is for a machine that no longer answers.
TIMEOUT = timedelta(minutes=10)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Workers:
    """The processes that share a run."""

    device: torch.device  # device of this process
    rank: int = 0  # number of this process
    count: int = 1  # number of processes
    is_first_on_machine: bool = True  # this process downloads for its machine

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def share_of(self, start: int, stop: int, unit: int = 1) -> slice:
        """Return this process's rows of ``start … stop``, in whole units but for the last one.

        With a batch as unit, all processes together make the same batches as one process.
        """
        units = -(-(stop - start) // unit)
        first, last = (units * rank // self.count for rank in (self.rank, self.rank + 1))
        return slice(min(start + first * unit, stop), min(start + last * unit, stop))

    def gather(self, value: Value) -> list[Value]:
        """Return every process's ``value``, by rank, in every process; tensors are on the CPU."""
        values = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value | None) -> Value:
        """Return the first process's ``value``, in every process."""
        return self.gather(value)[0]

    def require_same(self, inputs: Mapping[str, object]) -> None:
        """Raise a UserError if other processes have other inputs, by names for the user."""
        for rank, others in enumerate(self.gather(dict(inputs))):
            if different := [name for name in inputs if others[name] != inputs[name]]:
                names = " and ".join(different)
                raise UserError(f"processes {self.rank} and {rank} differ in {names}")

    @contextlib.contextmanager
    def one_a_machine_first(self) -> Iterator[None]:
        """Run the block in one process of each machine first, then in the others."""
        if self.count > 1 and not self.is_first_on_machine:
            distributed.barrier()
        yield
        if self.count > 1 and self.is_first_on_machine:
            distributed.barrier()


ALONE = Workers(torch.device("cpu"))


@contextlib.contextmanager
def join_workers(device: torch.device, shared: bool = True) -> Iterator[Workers]:
    """Join the processes that ``torchrun`` started, if it did; only the first goes on logging.

    If ``device`` is ``cuda``, each process takes the GPU of its number.

    Raises:
        UserError: There are several and no ``shared`` work; they cannot connect, are too many for
            the GPUs, or one of them ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Workers(device)
        return
    if not shared:
        raise UserError("this script runs in one process: start without torchrun")
    if device.type == "mps":
        raise UserError("an Apple GPU serves one process; start without torchrun, or --device cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    if device.type == "cuda":
        if local_rank >= (count := torch.cuda.device_count()):
            raise UserError(f"process {local_rank} of this machine finds {count} GPUs; start at "
                            "most one process a GPU")  # fmt: skip
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        distributed.init_process_group(backend, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"the processes cannot meet: {reason}; start them by torchrun") from None
    workers = Workers(device, distributed.get_rank(), distributed.get_world_size(), local_rank == 0)
    if not workers.is_first:
        log.setLevel(logging.ERROR)
    try:
        yield workers
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors that name its source file.
        if not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise
        if not workers.is_first:  # the first process prints the error
            raise SystemExit(EXIT_FAILED) from None
        raise UserError("another process of this run ended, or no longer answers") from None
    except KeyboardInterrupt:
        if not workers.is_first:
            raise SystemExit(EXIT_INTERRUPTED) from None
        raise
    finally:
        distributed.destroy_process_group()

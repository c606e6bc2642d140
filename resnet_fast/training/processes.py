"""The processes of a run: one, or those that torchrun started.

torchrun tells each process by its environment: RANK, LOCAL_RANK (on its machine) and WORLD_SIZE.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def world_size() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return which of them this one is."""
    return int(os.environ.get("RANK", "0"))


def is_first_process() -> bool:
    """Return whether this process prints and writes."""
    return rank() == 0


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Args:
        rank: its number; 0 prints and writes.
        size: how many there are.
        device: what it computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return everybody's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def of_first(self, value: T) -> T:
        """Return the first process's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the first one's running statistics."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Let the first process run the block before the others: what it downloads is there for them then."""
        if self.size > 1 and not self.is_first:
            dist.barrier()
        yield
        if self.size > 1 and self.is_first:
            dist.barrier()


@contextmanager
def join(device_name: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, by NCCL on GPUs and by gloo on CPUs; alone without it.

    Args:
        device_name: "cpu", "cuda" or "cuda:N"; on several processes each takes the GPU of its number on its machine.

    Raises:
        ValueError: one GPU is named for several processes, or a machine has fewer GPUs than processes.
    """
    device = torch.device(device_name)
    if world_size() == 1:
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None:
            raise ValueError(f"device must be cuda or auto on several processes, got {device_name}: each has its own")
        if local_rank >= count:
            raise ValueError(f"each process needs a GPU of its own, got {count} for process {local_rank + 1}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank(), world_size(), device)
    finally:
        dist.destroy_process_group()

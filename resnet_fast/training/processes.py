"""The processes of a run: a single one, or those that torchrun started.

No process may leave alone, because the others would wait for it. So an error of one process is raised in all
(`together`), and a signal is kept until all can leave (`signals_together`). If one is lost, torchrun ends the others.
"""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_fast.training.torchrun import rank, world_size

T = TypeVar("T")

# The others wait while the first one downloads data, and while it draws the network's errors.
PATIENCE = timedelta(hours=1)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class OtherProcessError(RuntimeError):
    """Another process of the run failed; the message holds its error."""


class LostProcessError(RuntimeError):
    """Another process of the run ended in the middle of it."""


class KeptSignals:
    """SIGINT and SIGTERM that have arrived and not taken effect yet."""

    def __init__(self) -> None:
        self.arrived: set[int] = set()
        self.handlers: dict[int, Any] = {}

    @contextmanager
    def all(self) -> Iterator[None]:
        """Keep the signals that arrive in the block; outside of the main thread, which gets them, do nothing."""
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
        try:
            for number in self.handlers:
                signal.signal(number, self._keep)
            yield
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            self.handlers = {}
            self.arrived.clear()

    def deliver(self, number: int) -> None:
        """Let a signal take effect."""
        self.arrived.discard(number)
        if number in self.handlers:
            signal.signal(number, self.handlers[number])
        signal.raise_signal(number)
        if number in self.handlers:
            signal.signal(number, self._keep)

    def deliver_all(self) -> None:
        """Let all kept signals take effect."""
        for number in sorted(self.arrived):
            self.deliver(number)

    def _keep(self, number: int, frame: object) -> None:
        self.arrived.add(number)


@dataclass(frozen=True)
class Processes:
    """This process, connected with the others of the run.

    Args:
        rank: number of this process; process 0 prints and writes.
        size: number of processes.
        device: the device that this process computes on.
        kept: signals kept until all processes can leave.
    """

    rank: int
    size: int
    device: torch.device
    kept: KeptSignals = field(default_factory=KeptSignals)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return the first process's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the first process's buffers, such as running statistics, to all others."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def together(self, call: Callable[[], T]) -> T:
        """Run `call` in every process; return its result here once it has returned everywhere.

        Raises:
            OtherProcessError: it failed in another process. The first process in which it failed raises its own error.
        """
        if self.size == 1:
            return call()
        value, error = None, None
        try:
            value = call()
        except Exception as caught:
            error = caught
        self._agree(error)
        return value  # type: ignore[return-value]

    def first_only(self, call: Callable[[], T]) -> T | None:
        """Run `call` in the first process only; the others wait, and fail if it fails."""
        return self.together(call if self.is_first else lambda: None)

    def first_goes_first(self, call: Callable[[], T]) -> T:
        """Do as `together`, but in the first process before the others, which then find what it downloaded."""
        if not self.is_first:
            self._agree(None)
        value = self.together(call)
        if self.is_first:
            self._agree(None)
        return value

    def _agree(self, error: Exception | None) -> None:
        """Raise in every process if there is an error in any."""
        reasons = self.gather(None if error is None else str(error) or type(error).__name__)
        failed = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
        if failed == self.rank and error is not None:
            raise error
        if failed is not None:
            raise OtherProcessError(f"process {failed}: {reasons[failed]}") from error

    @contextmanager
    def signals_together(self) -> Iterator[None]:
        """Keep SIGINT and SIGTERM until all processes call `deliver_signals`; a single process gets them at once.

        If one process left at once, the others would wait for it: on GPUs, in a wait that no signal interrupts.
        """
        if self.size == 1:
            yield
            return
        with self.kept.all():
            try:
                yield
            except RuntimeError as error:
                # The signal also reaches the workers that read images; the error may only mean that they ended. But if
                # a process is lost, torchrun has sent the signal for that reason.
                if not _is_lost(error):
                    self.kept.deliver_all()
                raise
            self.kept.deliver_all()

    def deliver_signals(self) -> None:
        """Deliver to every process the signals that any process kept; none does outside of `signals_together`."""
        if self.size == 1:
            return
        arrived = torch.tensor([float(number in self.kept.arrived) for number in SIGNALS], device=self.device)
        for number, count in zip(SIGNALS, self.sum(arrived).tolist(), strict=True):
            if count:
                self.kept.deliver(number)


@contextmanager
def connect(device_name: str) -> Iterator[Processes]:
    """Connect the processes that torchrun started, by NCCL on GPUs and gloo on CPUs; without torchrun, there is one.

    If torch.distributed is already initialized, as within another `connect`, it stays so at the end.

    Args:
        device_name: "cpu", "cuda" or "cuda:N"; each of several processes uses the GPU numbered by its local rank.

    Raises:
        ValueError: one GPU is named for several processes, or this machine has fewer GPUs than processes.
        LostProcessError: another process ended.
    """
    device = torch.device(device_name)
    if world_size() == 1:
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        n_here, count = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if device.index is not None:
            raise ValueError(f"device must be cuda or auto with several processes, got {device_name}")
        if n_here > count:
            raise ValueError(f"each process needs a GPU of its own, got {count} for {n_here} processes")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with _process_group(device):
        try:
            yield Processes(rank(), world_size(), device)
        except RuntimeError as error:
            if _is_lost(error):
                raise LostProcessError("another process of this run is gone; it, or torchrun, says why") from error
            raise


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """Connect the processes within the block.

    What communicates through the group, such as DistributedDataParallel, must be freed before the block ends.
    Destroying gloo's group joins its threads, which need the interpreter lock. It is released only if Python drops the
    last reference to the group.
    """
    if dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    except BaseException as error:
        forget: BaseException | None = error
        while forget is not None:
            traceback.clear_frames(forget.__traceback__)
            forget = forget.__context__
        if device.type == "cuda":  # destroying waits for the others
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _is_lost(error: RuntimeError) -> bool:
    """Return whether the error means that another process is gone; gloo has no exception type of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)

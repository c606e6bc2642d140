"""The processes of a run: one, or those that torchrun started.

None may leave alone: the others would wait for it. An error that one process may have alone is told to all at once
(`together`), a signal is kept until all can leave (`signals_together`), and where a process is lost all the same,
torchrun ends the others.
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

# The others wait while the first one downloads, and while it draws what the network gets wrong.
PATIENCE = timedelta(hours=1)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class OtherProcessError(RuntimeError):
    """Another process of the run has an error, which the message holds."""


class LostProcessError(RuntimeError):
    """Another process of the run ended in the middle of it."""


class KeptSignals:
    """SIGINT and SIGTERM that arrived and have had no effect yet."""

    def __init__(self) -> None:
        self.arrived: set[int] = set()
        self.handlers: dict[int, Any] = {}

    @contextmanager
    def all(self) -> Iterator[None]:
        """Keep those that arrive in the block; only the main thread may, and needs to, do so."""
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
        """Let a signal have its effect."""
        self.arrived.discard(number)
        if number in self.handlers:
            signal.signal(number, self.handlers[number])
        signal.raise_signal(number)
        if number in self.handlers:
            signal.signal(number, self._keep)

    def deliver_all(self) -> None:
        """Let all have their effect."""
        for number in sorted(self.arrived):
            self.deliver(number)

    def _keep(self, number: int, frame: object) -> None:
        self.arrived.add(number)


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Args:
        rank: its number; 0 prints and writes.
        size: how many there are.
        device: what it computes on.
        kept: signals for which it waits for the others.
    """

    rank: int
    size: int
    device: torch.device
    kept: KeptSignals = field(default_factory=KeptSignals)

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

    def broadcast(self, value: T) -> T:
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

    def together(self, call: Callable[[], T]) -> T:
        """Return what the call returns here, once it has returned everywhere.

        Raises:
            OtherProcessError: it failed elsewhere; of those where it failed the first raises its own error.
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
        """Let the first process alone do something; the others wait, and fail if it fails."""
        return self.together(call if self.is_first else lambda: None)

    def first_goes_first(self, call: Callable[[], T]) -> T:
        """As `together`, the first process before the others: what it downloads is there for them then."""
        if not self.is_first:
            self._agree(None)
        value = self.together(call)
        if self.is_first:
            self._agree(None)
        return value

    def _agree(self, error: Exception | None) -> None:
        """Raise everywhere if there is an error anywhere."""
        reasons = self.gather(None if error is None else str(error) or type(error).__name__)
        failed = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
        if failed == self.rank and error is not None:
            raise error
        if failed is not None:
            raise OtherProcessError(f"process {failed}: {reasons[failed]}") from error

    @contextmanager
    def signals_together(self) -> Iterator[None]:
        """Keep SIGINT and SIGTERM until all processes call `deliver_signals`; one process gets them at once.

        A process that left at once would leave the others waiting for it, on GPUs where no signal reaches them.
        """
        if self.size == 1:
            yield
            return
        with self.kept.all():
            try:
                yield
            except RuntimeError as error:
                # Those that read images got the signal, too, and may be what is missed; but where a process is gone,
                # torchrun has sent it because of that.
                if not _is_lost(error):
                    self.kept.deliver_all()
                raise
            self.kept.deliver_all()

    def deliver_signals(self) -> None:
        """Give to every process the signals that any got; outside of `signals_together` none is kept."""
        if self.size == 1:
            return
        arrived = torch.tensor([float(number in self.kept.arrived) for number in SIGNALS], device=self.device)
        for number, count in zip(SIGNALS, self.sum(arrived).tolist(), strict=True):
            if count:
                self.kept.deliver(number)


@contextmanager
def connect(device_name: str) -> Iterator[Processes]:
    """Connect the processes that torchrun started, by NCCL on GPUs and by gloo on CPUs; alone without it.

    Within another `connect`, or where torch.distributed is initialized already, they stay connected at the end.

    Args:
        device_name: "cpu", "cuda" or "cuda:N"; on several processes each takes the GPU of its number on its machine.

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
            raise ValueError(f"device must be cuda or auto on several processes, got {device_name}: each has its own")
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

    What exchanges by them, as DistributedDataParallel, must be gone at its end: gloo's group waits for its threads when
    it goes, and they wait for the interpreter, which the group lets go of only where python holds its last reference.
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
    """Whether this is how an exchange says that another process is gone; gloo has no exception of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)

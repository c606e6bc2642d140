"""The ledger: the bytes of each argument that every interpreted launch reads and writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from interpreter import watched_memory
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fast.ops import launch


class Account:
    """How often one launch read and wrote each element of one argument."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.shape, self.itemsize = name, tuple(tensor.shape), tensor.element_size()
        self.start = tensor.data_ptr()
        self.end = self.start + tensor.numel() * self.itemsize  # operators see dense tensors alone
        self.times = {kind: np.zeros(tensor.numel(), np.int64) for kind in ("read", "written")}

    def moved(self, kind: str) -> int:
        """Bytes, each once: caches hold what is read again, partial results, vectors and the pivots' rows."""
        return self.itemsize * int(np.count_nonzero(self.times[kind]))

    @property
    def what(self) -> str:
        """What kernels/README.md counts it as; what a convolution moves by descriptors, and weights, are apart."""
        if self.name.endswith("_desc"):
            return "operands"
        if self.itemsize == 1:
            return "bits"
        if "partial" in self.name:
            return "partials"
        if self.name == "barrier_ptr":
            return "barrier"
        return "images" if len(self.shape) == 4 else "vectors"


class Launch:
    """One launch of `kernel`, by the names of its tensor arguments."""

    def __init__(self, kernel, arguments: dict) -> None:
        self.kernel = kernel.__name__
        tensors = {name: v.base if isinstance(v, TensorDescriptor) else v for name, v in arguments.items()}
        self.accounts = {name: Account(name, value) for name, value in tensors.items() if isinstance(value, Tensor)}

    def book(self, kind: str, addresses: np.ndarray, itemsize: int) -> None:
        if addresses.size == 0:
            return
        first, last = int(addresses.min()), int(addresses.max())
        for account in self.accounts.values():
            if account.start <= first and last + itemsize <= account.end:
                assert itemsize == account.itemsize
                np.add.at(account.times[kind], (addresses - np.uint64(account.start)) // np.uint64(itemsize), 1)
                return
        raise IndexError(f"{self.kernel}: {kind} at [{first:#x}, {last + itemsize:#x}), inside no argument")


@contextmanager
def ledger() -> Iterator[list[Launch]]:
    """The launches inside the context, counted. An access that leaves its argument raises."""
    launches: list[Launch] = []
    run = launch.launch_kernel

    def counted(kernel, grid, *options, **arguments):
        launches.append(Launch(kernel, arguments))
        with watched_memory(launches[-1].book):
            run(kernel, grid, *options, **arguments)

    with mock.patch.object(launch, "launch_kernel", counted):
        yield launches

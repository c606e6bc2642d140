"""A function as a CUDA graph: recorded once, replayed by one launch instead of the hundreds that a step takes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from resnet_fast.ops.backend import single_read

T = TypeVar("T")


def _barrier_words(stream: torch.cuda.Stream) -> AbstractContextManager[Tensor | None]:
    """The memory in which programs of the fused kernels wait for each other: a graph has its own, and keeps it."""
    if single_read is None:
        return nullcontext()
    return single_read.words_of(stream.device).recording(stream.cuda_stream)


class CudaGraph(Generic[T]):
    """Records `run`; a call replays it and returns what it returned, in the same tensors, with new values.

    `run` must read its inputs from tensors that stay, and leave its results in such: a replay runs the same kernels on
    the same addresses. Before it is recorded it is run a few times, for compilation, cuDNN's choice of algorithms and
    whatever else happens once; recording runs nothing. Graphs that never run at once may share a memory `pool`
    (torch.cuda.graph_pool_handle()).
    """

    def __init__(self, run: Callable[[], T], n_warm_up: int = 3, pool: Any = None) -> None:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        sync_mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(stream):
            for i in range(n_warm_up):
                # A line that waits for the GPU is refused here: in a recording, it leaves torch's generator unusable.
                torch.cuda.set_sync_debug_mode("error" if i == n_warm_up - 1 else sync_mode)
                try:
                    run()
                finally:
                    torch.cuda.set_sync_debug_mode(sync_mode)
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # A recording that fails leaves its own stream as the current one.
        with _barrier_words(stream) as self.barrier_words, torch.cuda.stream(current):
            # Torch's default is one stream for all graphs, on the device of the first. Other threads, such as the one
            # that pins what a DataLoader read, may go on allocating meanwhile.
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.result = run()

    def __call__(self) -> T:
        self.graph.replay()
        return self.result

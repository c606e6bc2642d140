"""Record a function as a CUDA graph, which one launch replays, in place of the hundreds of a step."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from resnet_fast.ops.backend import single_read

T = TypeVar("T")


def _barrier_words(stream: torch.cuda.Stream) -> AbstractContextManager[Tensor | None]:
    """Return a context that gives a graph its own memory for the barriers between programs of a fused kernel."""
    if single_read is None:
        return nullcontext()
    return single_read.words_of(stream.device).recording(stream.cuda_stream)


class CudaGraph(Generic[T]):
    """A recording of `run`. A call replays it and returns the same tensors with new values.

    Args:
        run: a function whose inputs and results keep their memory: a replay runs the same kernels on the same memory.
        n_warm_up: number of calls before the recording, for compilation, cuDNN's choice of algorithms and whatever else
            happens once. Recording executes no kernel.
        pool: memory of torch.cuda.graph_pool_handle(), which graphs may share that never run at the same time.
    """

    def __init__(self, run: Callable[[], T], n_warm_up: int = 3, pool: Any = None) -> None:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        sync_mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(stream):
            for i in range(n_warm_up):
                # Refuse a line that waits for the GPU here: in a recording, it leaves torch's generator unusable.
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
            # that pins what a DataLoader read, may allocate meanwhile.
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.result = run()

    def __call__(self) -> T:
        self.graph.replay()
        return self.result

"""Launches of the batch norm that reads every image once (kernels/batch_norm_single_read.py). Imports triton.

`forward` and `backward` return the same as in launch.py, and can be combined with those. Callers have checked the
tensors, as there. A launch needs 32-bit words for its barrier, and the device must run all of its programs at the
same time; `fits` tells whether both are possible.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from resnet_fast.kernels import batch_norm_single_read, tiles

from . import launch
from .arguments import NO_STATISTICS, Gradients, Inputs, Join, Outputs, Saved, Settings, Statistics
from .implementations import DTYPES, Operation
from .launch import Shape

PRETENDED_MULTIPROCESSORS = 4  # of a CPU, in the interpreter

# Words for the launches in all CUDA graphs that are recorded outside `recording`: 256 KB, and per launch a line of 128
# bytes. So launches do not compete for lines, and pointers have the same alignment as in warm-up. For another alignment
# Triton would compile and load another kernel, which no recording allows. ResNet-18 has at most 40 launches per step.
GRAPH_WORDS = 1 << 16
LINE = 32


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors, each of which runs one program; 0 if unknown (GPUs not from NVIDIA)."""
    if device.type == "cpu":
        return PRETENDED_MULTIPROCESSORS
    if device.type != "cuda" or not torch.version.cuda:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


class BarrierWords:
    """The barrier words of one device. Each launch leaves its words ready for another launch of any size.

    Launches on one stream run one after the other, so they share the stream's words. Launches that are recorded into a
    CUDA graph inside `recording` share words that belong to the graph, because a replay may run in parallel with other
    launches. A launch that is recorded without `recording` keeps its words, from a block allocated beforehand.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_streams: dict[int, Tensor] = {}
        self.of_recordings: dict[int, Tensor] = {}  # by stream, because a recording's backward runs in another thread
        self.of_graphs = self._zeros(0)
        self.lock = Lock()

    def _zeros(self, n_words: int) -> Tensor:
        return torch.zeros(n_words, dtype=torch.int32, device=self.device)

    def _is_recording(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @contextmanager
    def recording(self, stream: int) -> Iterator[Tensor]:
        """Let launches that are recorded on a stream share words, which must live as long as the graph."""
        words = self.of_recordings[stream] = self._zeros(multiprocessors(self.device))
        try:
            yield words
        finally:
            del self.of_recordings[stream]

    def reserve(self, n_words: int) -> bool:
        """Return whether the current stream has `n_words` words; allocate them first unless it is recording."""
        with self.lock:
            if self._is_recording():
                return len(self.of_recordings.get(self._stream(), self.of_graphs)) >= n_words
            if not self.of_streams:
                self.of_graphs = self._zeros(GRAPH_WORDS)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # from now on, every stream sees zeros
            if self._stream() not in self.of_streams:
                self.of_streams[self._stream()] = self._zeros(multiprocessors(self.device))
            return len(self.of_streams[self._stream()]) >= n_words

    def take(self, n_words: int) -> Tensor:
        """Return the words of the next launch on the current stream, after `reserve` has returned True."""
        if not self._is_recording():
            return self.of_streams[self._stream()][:n_words]
        with self.lock:
            if self._stream() in self.of_recordings:
                return self.of_recordings[self._stream()][:n_words]
            words, self.of_graphs = self.of_graphs[:n_words], self.of_graphs[_in_lines(n_words) :]
        return words

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0


def _in_lines(n_words: int) -> int:
    return -(-n_words // LINE) * LINE


_words: dict[torch.device, BarrierWords] = {}


def words_of(device: torch.device) -> BarrierWords:
    if device not in _words:
        _words[device] = BarrierWords(device)
    return _words[device]


def choose_tiles(shape: Shape, operation: Operation, join: Join, device: torch.device) -> tiles.Tiles | None:
    is_forward = operation == "batch norm"
    most_tiles = (tiles.SINGLE_READ_FORWARD_TILES if is_forward else tiles.SINGLE_READ_BACKWARD_TILES)[join]
    return tiles.choose_single_read_tiles(shape.n_rows, shape.n_channels, multiprocessors(device), most_tiles)


def fits(x: Tensor, operation: Operation, join: Join, ghost_batch_size: int = 0) -> bool:
    """Return whether the operation can run: one group of a 16-bit type in channels_last, small enough for the device.

    The first call on a stream allocates words for the barrier; the first on a device also waits for the device.
    """
    shape = Shape.of(x, ghost_batch_size)
    if x.dtype not in DTYPES or not shape.channels_last or shape.n_groups > 1:
        return False
    tiling = choose_tiles(shape, operation, join, x.device)
    return tiling is not None and words_of(x.device).reserve(tiling.n_channel_tiles)


def plan_launch(x: Tensor, operation: Operation, join: Join) -> tuple[tiles.Tiles, Tensor]:
    """Return the tiles and the barrier's words of a launch.

    Raises:
        RuntimeError: the programs cannot all run at the same time, or there are no words left; see `fits`.
    """
    shape = Shape.of(x)
    tiling = choose_tiles(shape, operation, join, x.device)
    n_programs = multiprocessors(x.device)
    if tiling is None or tiling.n_programs > n_programs:
        raise RuntimeError(
            f"all programs of a single-read batch norm must run at once, one per multiprocessor: {n_programs} "
            f"multiprocessors cannot hold the {operation} of {shape.n_rows} rows and {shape.n_channels} channels"
        )
    words = words_of(x.device)
    if not words.reserve(tiling.n_channel_tiles):
        raise RuntimeError(
            f"a single-read batch norm needs {tiling.n_channel_tiles} words for its barrier: none are left for CUDA "
            "graphs, or the first single-read batch norm of the process is being recorded into one"
        )
    return tiling, words.take(tiling.n_channel_tiles)


def forward(inputs: Inputs, settings: Settings) -> Outputs:
    """Compute relu(bn(x) + residual) with batch statistics."""
    x = inputs.x
    shape = Shape.of(x)
    tiling, words = plan_launch(x, "batch norm", settings.join)

    def statistics() -> Statistics:
        partials = x.new_empty(1 + tiling.n_parts, shape.n_channels, 2, dtype=torch.float32)
        return Statistics(*launch.empty_statistics(x, shape), partials=partials)

    own, other = statistics(), statistics() if settings.join == "bn" else NO_STATISTICS
    y, relu_mask = launch.empty_outputs(inputs, settings, shape)
    kernel = batch_norm_single_read.single_read_forward_kernel
    launch.launch_kernel(
        kernel,
        (tiling.n_programs,),
        tiles.SINGLE_READ_OPTIONS,
        **launch.pointers(kernel, own) | launch.pointers(kernel, other, "residual_") | launch.pointers(kernel, inputs),
        barrier_ptr=words,
        y_ptr=y,
        relu_mask_ptr=relu_mask,
        n_rows=shape.n_rows,
        n_splits=tiling.n_parts,
        momentum=inputs.momentum,
        eps=settings.eps,
        residual_momentum=inputs.residual_momentum,
        residual_eps=settings.residual_eps,
        RELU=settings.relu,
        TILE=tiling.tile,
    )
    return Outputs(y, relu_mask, own.mean, own.rstd, other.mean, other.rstd)


def backward(dy: Tensor, dy_alias: Tensor | None, saved: Saved, settings: Settings) -> Gradients:
    """Compute the gradients of relu(bn(x) + residual), with batch statistics for x and the bn join's residual."""
    x, join = saved.x, settings.join
    shape = Shape.of(x)
    tiling, words = plan_launch(x, "batch norm backward", join)
    partials = x.new_empty(3 if join == "bn" else 2, tiling.n_parts, shape.n_channels, dtype=torch.float32)
    writes_dz = join == "add" and (saved.relu_mask is not None or dy_alias is not None)  # else dresidual is dy itself
    dz = torch.empty_like(x) if writes_dz else None
    gradients = launch.empty_gradients(saved)._replace(
        dx=torch.empty_like(x), dresidual=torch.empty_like(x) if join == "bn" else None
    )
    kernel = batch_norm_single_read.single_read_backward_kernel
    launch.launch_kernel(
        kernel,
        (tiling.n_programs,),
        tiles.SINGLE_READ_OPTIONS,
        dy_ptr=dy,
        dy_alias_ptr=dy_alias,
        **launch.pointers(kernel, saved),
        barrier_ptr=words,
        partials_ptr=partials,
        dz_ptr=dz,
        **launch.pointers(kernel, gradients),
        n_rows=shape.n_rows,
        n_splits=tiling.n_parts,
        RELU=settings.relu,
        TILE=tiling.tile,
    )
    return gradients._replace(dresidual=dz) if join == "add" else gradients

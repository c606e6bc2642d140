"""ResNet-18's 3x3 convolutions of stride 1 and their data gradients: cuDNN, and ours with every tiling.

The directions "with statistics" and "with sums" are those of a training step next to a batch norm. There cuDNN's
convolution is followed by the pass that ours makes unnecessary. Ours always computes statistics or sums: in "forward"
it therefore does more than cuDNN. Weights are already in the setting's precision.

Device time: launches are hidden (see timing.alternate). Inputs rotate through more memory than the L2 cache holds.
"""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input
from torch.utils import deterministic

from benchmarks.correctness import Tolerance
from benchmarks.harness import Level, Problem, Provider, Run, Setting
from benchmarks.replay import CLOCK
from benchmarks.work import STAGES, Work
from resnet_fast.kernels.conv_tiles import ConvTiles, conv_candidates
from resnet_fast.ops.arguments import BatchNormArgs, Join, PartialStatistics, Saved, Settings, arguments_of
from resnet_fast.ops.backend import cudnn_benchmark
from resnet_fast.pairs import library_gradients
from resnet_fast.profiling.check import rounding_of
from resnet_fast.tuning.timing import rotation

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_SIZES = {"cpu": (16,), "cuda": (128, 512, 1024)}
QUICK_BATCH_SIZE = 512
STATISTICS = BatchNormArgs(None, None, training=True)  # of the batch norm after the convolution
EPS = STATISTICS.eps
N_ROUNDINGS = 2  # of the result, and of the addition of gradients at a fork


class Norm(NamedTuple):
    """The batch norm + ReLU before the convolution: its join, and whether its output is forked."""

    join: Join
    fork: bool


FORWARD, WITH_STATISTICS = "forward", "forward with statistics"
# For a block's second convolution, after BN+ReLU, and its first, after another block.
WITH_SUMS = {"data gradient with sums": Norm("none", False), "data gradient with sums, forked": Norm("add", True)}
DIRECTIONS = (FORWARD, WITH_STATISTICS, *WITH_SUMS)


class Inputs(NamedTuple):
    """x and dy, [N, C, W, W]; for sums what the batch norm saved, and at a fork the shortcut's dx."""

    x: Tensor
    dy: Tensor
    saved: Saved | None
    dx_alias: Tensor | None


class Data:
    """The weight, [C, C, 3, 3], and sets of inputs, through which all providers rotate together.

    The first set is checked; `passes` is where its ReLU passes gradients on, None without sums.
    """

    def __init__(self, direction: str, weight: Tensor, sets: list[Inputs], passes: Tensor | None) -> None:
        self.direction, self.weight, self.sets, self.passes = direction, weight, sets, passes
        self.turn = itertools.cycle(sets)


class ConvRun(Run):
    """A convolution; a call returns the direction's results in the order of `result_names`."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __call__(self) -> tuple[Tensor, ...]:
        with cudnn_benchmark(True):
            return self.run(next(self.data.turn))

    @abstractmethod
    def run(self, inputs: Inputs) -> tuple[Tensor, ...]: ...

    def observe(self) -> dict[str, Tensor]:
        with unwritten_is_nan():
            results = dict(zip(result_names(self.data.direction), self.run(self.data.sets[0]), strict=True))
        if self.data.passes is not None:  # after cuDNN the next pass applies ReLU's mask
            results["dz"] = results["dz"] * self.data.passes
        return results


class CudnnRun(ConvRun):
    """cuDNN's convolution as autograd calls it, then the passes of the two-pass batch norm."""

    def run(self, inputs: Inputs) -> tuple[Tensor, ...]:
        x, dy, saved, dx_alias = inputs
        weight, direction = self.data.weight, self.data.direction
        if direction in (FORWARD, WITH_STATISTICS):
            y = F.conv2d(x, weight, padding=1)
            return (y,) if direction == FORWARD else (y, *_statistics(y))
        dx, _ = library_gradients(dy, x, weight, True, False)
        assert saved is not None and dx is not None
        launch, settings = _launch(), Settings(WITH_SUMS[direction].join, True, True, False)
        dz, partials, n_splits = launch.partial_sums(dx, dx_alias, saved, settings, launch.Shape.of(dx))
        _, gradients = launch.combine_gradients(partials, 1, n_splits, saved)
        return dx if dz is None else dz, gradients.dweight, gradients.dbias


class FusedRun(ConvRun):
    """kernels/conv3x3.py with one tiling."""

    def __init__(self, data: Data, tiles: ConvTiles) -> None:
        super().__init__(data)
        self.tiles = tiles

    def run(self, inputs: Inputs) -> tuple[Tensor, ...]:
        from resnet_fast.ops import conv3x3  # imports triton, without which nothing is measured here

        x, dy, saved, dx_alias = inputs
        weight, direction = self.data.weight, self.data.direction
        if direction in (FORWARD, WITH_STATISTICS):
            y, parts = conv3x3.forward(x, weight, self.tiles)
            return (y,) if direction == FORWARD else (y, *_statistics(y, parts))
        assert saved is not None
        dz, sums, _ = conv3x3.data_gradient(dy, weight, self.tiles, saved, dx_alias)
        return dz, sums[1, 0], sums[0, 0]


def _statistics(y: Tensor, partial: PartialStatistics | None = None) -> tuple[Tensor, Tensor]:
    launch = _launch()
    shape = launch.Shape.of(y)
    return launch.combine_statistics(partial or launch.partial_statistics(y, shape), STATISTICS, shape)


def _launch() -> Any:
    from resnet_fast.ops import launch  # imports triton, as above

    return launch


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Fill torch.empty with NaN, because it could hold the previous provider's results."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fills  # type: ignore[assignment]


def result_names(direction: str) -> tuple[str, ...]:
    """Return the names of a run's results."""
    names = {FORWARD: ("y",), WITH_STATISTICS: ("y", "mean", "rstd")}
    return names.get(direction) or ("dz", "norm's dweight", "norm's dbias")


def candidates(setting: Setting) -> dict[str, ConvTiles]:
    """Return the tilings for the setting's shape by the provider's name."""
    n_channels, width = setting.shape
    with_sums = setting.direction in WITH_SUMS
    tiles = conv_candidates(n_channels, n_channels, setting.batch_size * width**2, with_sums)
    return {provider_name(tiling): tiling for tiling in tiles}


def provider_name(tiles: ConvTiles) -> str:
    shape = f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}"
    return f"conv3x3 {shape}, {tiles.num_warps} warps, {tiles.num_stages} stages, {tiles.per_program} in turn"


def build_conv3x3(name: str, setting: Setting, data: Data) -> ConvRun:
    return FusedRun(data, candidates(setting)[name])


def compiled_why_not(setting: Setting, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "compiled Triton kernels and cuDNN need CUDA"


def all_settings(batch_sizes: Iterable[int], precisions: Iterable[str]) -> Iterator[Setting]:
    for precision, direction, batch_size, shape in itertools.product(precisions, DIRECTIONS, batch_sizes, STAGES):
        case = f"conv3x3 {shape[0]}x{shape[1]}x{shape[1]}"
        yield Setting(case, direction, precision, "channels_last", batch_size, shape)


@cache
def all_names() -> tuple[str, ...]:
    """Return the provider names of every tiling in any setting."""
    batch_sizes = {size for sizes in BATCH_SIZES.values() for size in sizes}
    settings = all_settings(sorted(batch_sizes), ("bf16",))
    return tuple(dict.fromkeys(name for setting in settings for name in candidates(setting)))


class ConvLevel(Level):
    name = "convolution"
    hide_launches = True
    rounds = {"cpu": 20, "cuda": 100}
    quick_rounds = {"cpu": 8, "cuda": 30}
    providers = {
        "cudnn": Provider(lambda setting, data: CudnnRun(data), compiled_why_not),
        **{name: Provider(partial(build_conv3x3, name), compiled_why_not) for name in all_names()},
    }

    def settings(self, device: torch.device, quick: bool) -> Iterator[Setting]:
        batch_sizes = BATCH_SIZES[device.type]
        if quick and device.type == "cuda":
            batch_sizes = (QUICK_BATCH_SIZE,)
        yield from all_settings(batch_sizes, ("bf16",) if quick else DTYPES)

    def providers_of(self, setting: Setting) -> list[str]:
        return [self.baseline, *candidates(setting)]

    def problem(self, setting: Setting, device: torch.device) -> Problem:
        generator = torch.Generator(device).manual_seed(torch.seed())  # fresh data in every run
        n_channels, width = setting.shape
        dtype, norm = DTYPES[setting.precision], WITH_SUMS.get(setting.direction)

        def image() -> Tensor:
            shape = (setting.batch_size, n_channels, width, width)
            values = torch.randn(shape, generator=generator, device=device)
            return values.to(dtype).contiguous(memory_format=torch.channels_last)

        def inputs() -> Inputs:
            if norm is None:
                return Inputs(image().relu_(), image(), None, None)
            x, saved = through(norm, 1 + 2 * image(), image())
            return Inputs(x, image(), saved, image() if norm.fork else None)

        weight = torch.randn(n_channels, n_channels, 3, 3, generator=generator, device=device)
        weight = (weight / (3 * n_channels**0.5)).to(dtype).contiguous(memory_format=torch.channels_last)
        first = inputs()
        sets = [first, *(inputs() for _ in range(rotation(first.x.nbytes, device) - 1))]
        data = Data(setting.direction, weight, sets, None if norm is None else first.x > 0)
        n_rows = setting.batch_size * width**2
        rounding = rounding_of(setting.precision, torch.device("cpu"))
        return Problem(data, exact(data), Tolerance(rounding, N_ROUNDINGS, n_rows))

    def work(self, setting: Setting) -> Work:
        """Count each tensor of the convolution once; with sums also the batch norm's input and the fork's gradient."""
        n_channels, width = setting.shape
        n_elements = setting.batch_size * n_channels * width**2
        norm = WITH_SUMS.get(setting.direction)
        images = 2 if norm is None else 3 + norm.fork
        moved = setting.item_size * (images * n_elements + 9 * n_channels**2)
        if norm is not None and norm.join != "none":
            moved += n_elements / 8  # ReLU's bits
        return Work(moved, 2 * 9 * n_channels * n_elements)


def through(norm: Norm, x: Tensor, residual: Tensor) -> tuple[Tensor, Saved]:
    """Return the output of batch norm + ReLU, and what it saves for its backward."""
    n_channels = x.shape[1]
    weight = torch.linspace(0.5, 1.5, n_channels, device=x.device)
    bias = weight - 1
    norm_args = BatchNormArgs(None, None, weight, bias, training=True)
    arguments = arguments_of(x, norm_args, residual if norm.join == "add" else None)
    outputs = _launch().forward(*arguments)
    return outputs.y, Saved.of(*arguments, outputs)


def exact(data: Data) -> dict[str, Tensor]:
    """Return the first set's results in fp64, and in NCHW, because cuDNN has few fp64 convolutions in channels_last.

    ReLU's gradient is taken as 0 where the batch norm's output, which the kernels recompute bit by bit, is 0.
    """
    x, dy, saved, dx_alias = data.sets[0]
    wide_x, wide_dy, weight = (tensor.double().contiguous() for tensor in (x, dy, data.weight))
    if data.direction in (FORWARD, WITH_STATISTICS):
        y = F.conv2d(wide_x, weight, padding=1)
        var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        results = (y, mean[None], (var + EPS).rsqrt()[None])
    else:
        assert saved is not None and data.passes is not None
        dx = conv2d_input(wide_x.shape, weight, wide_dy, padding=1)
        dz = (dx + (0 if dx_alias is None else dx_alias.double())) * data.passes
        x_hat = (saved.x.double() - saved.mean.double().view(1, -1, 1, 1)) * saved.rstd.double().view(1, -1, 1, 1)
        results = (dz, (dz * x_hat).sum((0, 2, 3)), dz.sum((0, 2, 3)))
    return dict(zip(result_names(data.direction), results, strict=False))


LEVEL = ConvLevel()


@pytest.mark.benchmark(timer=CLOCK)
def test_convolution(timed: Callable[[], None]) -> None:
    timed()

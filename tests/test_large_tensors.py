"""Tensors of more than 2^31 elements: every offset is exact, on virtual memory and, if it suffices, on real memory."""

from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from budget import assert_within_budget
from fused_op import LAYOUTS, Case, Operands, eager, magnitudes, make_operands, ours, results
from interpreter import needs_interpreter, watched_memory
from torch import Tensor
from traffic import pivot_rows
from triton.runtime import interpreter

from resnet_fast.ops import BatchNormArgs, launch
from resnet_fast.ops.arguments import Saved, arguments_of

SHAPES = {
    "2^31 elements and one image": (8193, 64, 64, 64),
    "2^32 elements, odd channels": (1, 67, 8009, 8011),
    "2^31 rows": (3, 2, 27000, 27000),
}
HUGE_IMAGE = (1, 3, 46000, 47000)  # 2^31 pixels
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8"}
SPACING = 1 << 40  # bytes from one virtual argument to the next


def record_launches(shape: tuple, layout: str, join: str) -> list[tuple]:
    """(kernel, grid, arguments) of one training step on tensors without memory; "bn" is forked, "none" is not."""
    recorded = []
    x, dy, dy_alias, residual = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=LAYOUTS[layout]) for _ in range(4)
    )
    vector = torch.empty(shape[1], device="meta")
    norm = BatchNormArgs(vector, vector, vector, vector, training=True)
    with mock.patch.object(
        launch, "launch_kernel", lambda kernel, grid, **arguments: recorded.append((kernel, grid, arguments))
    ):
        if join == "none":
            inputs, settings = arguments_of(x, norm)
        else:
            inputs, settings = arguments_of(x, norm, residual, norm)
        saved = Saved.of(inputs, settings, launch.forward(inputs, settings))
        launch.backward(dy, None if join == "none" else dy_alias, saved, settings)
    return recorded


def some_turns(*bounds) -> list[int]:
    """The first turn of a loop, the middle one and the last two, for one may load ahead, stand for all."""
    turns = range(*bounds)
    return sorted({turns[0], turns[len(turns) // 2], *turns[-2:]}) if turns else []


def accessed(kernel, grid: tuple, arguments: dict, program: int) -> dict[str, np.ndarray]:
    """The element offsets that one program reads or writes, by argument, on memory that is not there."""
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    found: dict[str, list[np.ndarray]] = {name: [] for name in tensors}

    def watch(kind: str, addresses: np.ndarray, itemsize: int) -> None:
        assert len(set(addresses // SPACING)) <= 1
        for position in set(addresses // SPACING):
            found[tensors[int(position) - 1]].append((addresses % SPACING).astype(np.int64) // itemsize)

    def converted(name: str, value):
        if isinstance(value, Tensor):
            kind, number = tl.str_to_ty(TYPES[value.dtype], None), np.uint64((tensors.index(name) + 1) * SPACING)
        elif isinstance(value, int) and not name.isupper():
            kind, number = (tl.int32, np.int32(value)) if value < 2**31 else (tl.int64, np.int64(value))
        else:
            return value
        return tl.tensor(interpreter.TensorHandle(np.array([number]), kind), kind)

    interpreter.interpreter_builder.set_grid_dim(*grid, 1, 1)
    interpreter.interpreter_builder.set_grid_idx(program, 0, 0)
    function = kernel.rewrite()
    patched = interpreter._patch_lang(kernel.fn)
    try:
        with watched_memory(watch, virtual=True), mock.patch.dict(kernel.fn.__globals__, range=some_turns):
            function(**{name: converted(name, value) for name, value in arguments.items()})
    finally:
        patched.restore()
    return {name: np.unique(np.concatenate(offsets)) for name, offsets in found.items() if offsets}


def expected(kernel, arguments: dict, program: int) -> dict[str, np.ndarray]:
    """The element offsets of that program's tiles, by argument; int64 holds them."""
    n_rows, n_spatial = arguments["n_rows"], arguments["n_spatial"]
    n_channels, channels_last, block_m, block_c, n_tiles = arguments["TILE"].values
    n_channel_tiles = -(-n_channels // block_c)
    part, first_channel = program // n_channel_tiles, program % n_channel_tiles * block_c
    channels = np.arange(first_channel, min(first_channel + block_c, n_channels))
    step = n_tiles * block_m
    is_reduction = kernel.__name__ in ("statistics_kernel", "reduce_kernel")
    rows_of_part = arguments["rows_per_split"] if is_reduction else step
    first, end = part * rows_of_part, min((part + 1) * rows_of_part, n_rows)
    if kernel.__name__ == "statistics_kernel":  # which loads a step ahead: whole ones, then what is left
        whole = first + (end - first) // step * step
        steps = [at for at in (first, *some_turns(first + step, whole + step, step)) if at < whole] + [whole]
    else:
        steps = some_turns(first, end, step)
    rows = np.concatenate([np.arange(at, min(at + step, end)) for at in steps])

    def offsets(rows: np.ndarray) -> np.ndarray:
        if channels_last:
            return rows[:, None] * n_channels + channels
        return (rows // n_spatial * n_channels * n_spatial + rows % n_spatial)[:, None] + channels * n_spatial

    images = offsets(rows)
    if kernel.__name__ == "statistics_kernel":
        images = np.concatenate([images.flatten(), offsets(pivot_rows(n_rows, block_m)).flatten()])
    if channels_last:
        bits = rows[:, None] * -(-n_channels // 8) + channels // 8
    else:
        bits = (rows // 8)[:, None] + channels * -(-n_rows // 8)

    def of_tensor(name: str, tensor: Tensor) -> np.ndarray:
        if tensor.dtype == torch.uint8:
            return np.unique(bits)
        if tensor.dim() == 4:
            return np.unique(images)
        if tensor.dim() == 3 and kernel.__name__ in ("statistics_kernel", "normalize_kernel"):
            # Pairs, of the own split or of all, behind the pivots: the first half of a pair is read.
            splits = np.array([part]) if is_reduction else np.arange(len(tensor) - 1)
            pairs = 2 * ((1 + splits)[:, None] * n_channels + channels)
            pivots = 2 * channels if not is_reduction or part == 0 else channels[:0]
            written = (0, 1) if is_reduction else (0,)
            return np.unique([*pairs.flat, *(pairs + 1).flat, *(at for half in written for at in pivots + half)])
        if tensor.dim() == 3:  # sums: of the own split, or all of them
            n_sums, n_parts, _ = tensor.shape
            parts = [part] if is_reduction else np.arange(n_parts)
            of_parts = np.arange(n_sums)[:, None] * n_parts + parts
            return (of_parts.flatten()[:, None] * n_channels + channels).flatten()
        return channels

    return {name: of_tensor(name, value) for name, value in arguments.items() if isinstance(value, Tensor)}


@needs_interpreter
@pytest.mark.parametrize(
    ("shape", "layout", "join"),
    (
        ("2^31 elements and one image", "channels_last", "bn"),
        ("2^32 elements, odd channels", "channels_last", "none"),
        ("2^32 elements, odd channels", "nchw", "bn"),
        ("2^31 rows", "channels_last", "bn"),
        ("2^31 rows", "nchw", "none"),
    ),
)
def test_offsets_are_exact(shape, layout, join):
    kernels = set()
    for kernel, grid, arguments in record_launches(SHAPES[shape], layout, join):
        assert grid[0] < 2**31
        for program in (0, grid[0] // 2, grid[0] - 1):
            found = accessed(kernel, grid, arguments, program)
            for name, offsets in found.items():
                assert 0 <= offsets[0] and offsets[-1] < arguments[name].numel(), (kernel.__name__, program, name)
            if "combine" in kernel.__name__:
                continue
            kernels.add(kernel.__name__)
            exact = expected(kernel, arguments, program)
            for name, tile in exact.items():
                tensor = arguments[name]
                if tensor.dim() == 4 or tensor.dtype == torch.uint8 or name in found:
                    assert np.array_equal(found[name], tile), (kernel.__name__, program, name)
                    assert program < grid[0] - 1 or tensor.dim() < 4 or found[name][-1] == tensor.numel() - 1
    assert kernels == {"statistics_kernel", "normalize_kernel", "reduce_kernel", "input_gradients_kernel"}


def test_an_image_of_too_many_pixels_is_refused():
    """In NCHW, where pixels are counted in 32 bits; in channels_last nothing depends on it."""
    with pytest.raises(ValueError, match=f"at most {launch.MAX_NCHW_PIXELS} pixels, got 46000x47000"):
        record_launches(HUGE_IMAGE, "nchw", "none")
    assert record_launches(HUGE_IMAGE, "channels_last", "none")


def channels_of(operands: Operands, channels: list[int]) -> Operands:
    """The same operation on some of the channels, each of which is computed by itself."""
    x, residual, dy = (t[:, channels].contiguous() for t in (operands.x, operands.residual, operands.dy))
    norms = [BatchNormArgs(*(v[channels] if isinstance(v, Tensor) else v for v in norm)) for norm in operands.norms]
    return Operands(x, residual, norms, dy)


def free_memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


@pytest.mark.parametrize(
    "shape",
    (
        (3, 64, 8, 8),  # the comparison itself
        pytest.param(
            (8193, 64, 64, 64),
            # x, residual, y, their gradients, copies of the leaves: 12 images of 4.3 GB
            marks=pytest.mark.skipif(free_memory() < 60e9, reason="needs a GPU with 60 GB of free memory"),
        ),
    ),
    ids=("small", "2^31 elements and one image"),
)
def test_results_are_right(shape, device):
    """bf16, channels_last, forward and backward of the bn join: first, middle and last channels against eager."""
    generator = torch.Generator(device).manual_seed(0)
    operands = make_operands(Case("vectors", (2, *shape[1:2], 2, 2)), torch.bfloat16, "channels_last", device)
    for name in ("x", "residual", "dy"):
        image = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last)
        setattr(operands, name, image.normal_(generator=generator))
    found = results(ours, operands, "bn", True, "triton")
    channels = [0, 31, 63]
    part = channels_of(operands, channels)
    theirs, exact = results(eager, part, "bn", True), results(eager, part.to(torch.float64), "bn", True)
    added = magnitudes(part, "bn", closed=exact["y"] <= 0)
    for name in theirs:
        of_channels = found[name][:, channels] if found[name].dim() == 4 else found[name][channels]
        assert_within_budget(name, of_channels, theirs[name], exact[name], added.get(name))

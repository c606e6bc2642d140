"""What the 3x3 convolutions compile to, as JSON: a row for kernel, tiles and GPU. Run without TRITON_INTERPRET."""

import json
import re
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from compile_kernels import TARGETS, compile_for
from torch import Tensor
from triton.compiler import ASTSource

from benchmarks.speed_model.launches import Launch
from resnet_fast.kernels.conv_tiles import ConvTiles, conv_candidates
from resnet_fast.ops import conv3x3, launch
from resnet_fast.ops.arguments import BatchNormArgs, Saved, arguments_of

BATCH = 128
SHAPES = {(128, 16): "128x16x16", (16, 32): "16x32x32"}  # channels, width
ANYWHERE = (128, 64)  # block_m, block_n that need no stack on any GPU


def image(n_channels: int, width: int) -> Tensor:
    x = torch.empty(BATCH, n_channels, width, width, dtype=torch.bfloat16, device="meta")
    return x.contiguous(memory_format=torch.channels_last)


def launches(n_channels: int, width: int) -> Iterator[tuple[str, ConvTiles, Callable[[], object]]]:
    """Name, tiles, and what launches the kernel first."""
    x, n_rows = image(n_channels, width), BATCH * width**2
    weight = torch.empty(n_channels, n_channels, 3, 3, dtype=torch.bfloat16, device="meta")
    weight = weight.contiguous(memory_format=torch.channels_last)
    vector = torch.empty(n_channels, device="meta")
    bits = torch.empty(n_rows, n_channels // 8, dtype=torch.uint8, device="meta")
    plain = Saved(x, None, vector, vector, None, None, None, vector, vector, None, None)
    norms = {
        "BN+ReLU": (plain, None),
        "BN+ReLU, forked": (plain, x),
        "BN+add+ReLU, forked": (plain._replace(relu_mask=bits), x),
        "BN+BN+add+ReLU, forked": (Saved(x, x, *(vector,) * 4, bits, *(vector,) * 4), x),
    }
    for tiles in conv_candidates(n_channels, n_channels, n_rows, with_sums=False):
        yield "convolution", tiles, lambda tiles=tiles: conv3x3.forward(x, weight, tiles)
    for tiles in conv_candidates(n_channels, n_channels, n_rows, with_sums=True):
        is_default = (tiles.block_m, tiles.block_n) == ANYWHERE
        # Every batch norm with one cut, that with the most operands with every cut.
        for name, (saved, alias) in norms.items() if is_default else list(norms.items())[-1:]:
            yield (
                f"data gradient, {name}",
                tiles,
                lambda tiles=tiles, saved=saved, alias=alias: conv3x3.data_gradient(x, weight, tiles, saved, alias),
            )


def record(launching: Callable[[], object]) -> list[tuple[Launch, dict]]:
    recorded = []

    def run(kernel, grid, options=None, /, **arguments):
        options = options or launch.compiler_options(arguments, 90)
        recorded.append((Launch(kernel, arguments, grid), options))

    with mock.patch.multiple(
        launch, launch_kernel=run, nvidia_capability=lambda device: 90, has_pdl=lambda device: True
    ):
        launching()
    return recorded


def compile_first(launching: Callable[[], object], target: str, index: int = 0) -> dict:
    recorded, options = record(launching)[index]
    types, constants, attributes = recorded.signature(TARGETS[target])
    source = ASTSource(fn=recorded.kernel, signature=types, constexprs=constants, attrs=attributes)
    compiled, code = compile_for(source, TARGETS[target], options)
    ptx = compiled.asm["ptx"]
    return {
        "target": target,
        "stack": code.stack,
        "registers": code.registers,
        "matrix": code.matrix,
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "tma_loads": ptx.count("cp.async.bulk.tensor"),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]\.", ptx)),  # those that pipeline loads without TMA
        "shared": compiled.metadata.shared,
        "loads": sum(code.loads.values()),
        "from_registers": len(re.findall(r"wgmma\.mma_async\S* *\{[^}]*\}, *\{", ptx)),
        "evict_first": ptx.count("evict_first"),
    }


def reversed_passes() -> Iterator[tuple[str, dict]]:
    x, vector = image(128, 16), torch.empty(128, device="meta")
    norm = BatchNormArgs(vector, vector, vector, vector, training=True)
    inputs, settings = arguments_of(x, norm)
    saved = Saved(x, None, vector, vector, None, None, None, vector, vector, None, None)
    yield "normalize", compile_first(lambda: launch.forward(inputs, settings, reverse=True), "sm_90", -1)
    yield (
        "input gradients",
        compile_first(lambda: launch.backward(x, None, saved, settings, reverse=True), "sm_90", -1),
    )


if __name__ == "__main__":
    found = []
    for (n_channels, width), shape in SHAPES.items():
        for name, tiles, launching in launches(n_channels, width):
            targets = ["sm_90"]
            if (tiles.block_m, tiles.block_n) == ANYWHERE:
                targets += ["sm_80", "sm_100"]
            found += [
                {"kernel": name, "shape": shape, "tiles": tiles._asdict()} | compile_first(launching, target)
                for target in targets
            ]
    found += [
        {"kernel": f"{name}, reversed", "shape": "128x16x16", "tiles": None} | row for name, row in reversed_passes()
    ]
    print(json.dumps(found))

"""What the single-read kernels compile to, as JSON: case to registers, stack and accesses to global memory.

Run without TRITON_INTERPRET.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from unittest import mock

import torch
from compile_kernels import TARGETS, compile_for
from triton.compiler import ASTSource

from benchmarks.speed_model.launches import DTYPES, Launch, recorded_launches
from resnet_fast.kernels import tiles
from resnet_fast.ops import BatchNormArgs, single_read
from resnet_fast.ops.arguments import Outputs, Saved, arguments_of

MULTIPROCESSORS = 132


class Case(NamedTuple):
    """`n_tiles` of each tensor a program: 0 for the most there are."""

    direction: str
    join: str
    n_channels: int
    target: str = "sm_90"
    dtype: str = "bf16"
    relu: bool = True
    fork: bool = False
    n_tiles: int = 0


FULL = (  # every join at its limit, at the channels where it has the fewest registers to spare
    *(Case("forward", "none", 128), Case("forward", "add", 512), Case("forward", "bn", 256)),
    Case("backward", "none", 512),
    *(Case("backward", join, n_channels, fork=True) for join, n_channels in (("none", 64), ("add", 512), ("bn", 256))),
)
CASES = (
    *FULL,
    FULL[5]._replace(target="sm_80"),
    FULL[2]._replace(n_tiles=1),
    Case("forward", "none", 24, relu=False),
    Case("backward", "add", 24, relu=False),
)


def record_launch(case: Case) -> Launch:
    """The kernel and its arguments, of as many rows as give each program so many tiles."""
    most = tiles.SINGLE_READ_FORWARD_TILES if case.direction == "forward" else tiles.SINGLE_READ_BACKWARD_TILES
    of_one_row = tiles.choose_single_read_tiles(1, case.n_channels, MULTIPROCESSORS, 1)
    n_splits = MULTIPROCESSORS // of_one_row.n_channel_tiles
    n_rows = n_splits * of_one_row.tile.block_m.value * (case.n_tiles or most[case.join])
    x = torch.empty(n_rows // 4, case.n_channels, 2, 2, dtype=DTYPES[case.dtype], device="meta")
    x = x.to(memory_format=torch.channels_last)
    vector = torch.empty(case.n_channels, device="meta")
    norm = BatchNormArgs(vector, vector, vector, vector, training=True)
    is_bn, has_bits = case.join == "bn", case.relu and case.join != "none"
    inputs, settings = arguments_of(x, norm, None if case.join == "none" else x, norm if is_bn else None, case.relu)
    with (
        mock.patch.object(single_read, "multiprocessors", lambda device: MULTIPROCESSORS),
        recorded_launches() as recorded,
    ):
        if case.direction == "forward":
            single_read.forward(inputs, settings)
        else:
            bits = torch.empty(n_rows, case.n_channels // 8, dtype=torch.uint8, device="meta") if has_bits else None
            residual_statistics = (vector, vector) if is_bn else (None, None)
            saved = Saved.of(inputs, settings, Outputs(x, bits, vector, vector, *residual_statistics))
            single_read.backward(x, x if case.fork else None, saved, settings)
    assert not case.n_tiles or recorded[0].arguments["TILE"].n_tiles.value == case.n_tiles
    return recorded[0]


def compile_case(case: Case) -> dict:
    recorded, target = record_launch(case), TARGETS[case.target]
    types, constants, attributes = recorded.signature(target)
    source = ASTSource(fn=recorded.kernel, signature=types, constexprs=constants, attrs=attributes)
    compiled, code = compile_for(source, target, tiles.SINGLE_READ_OPTIONS)
    return {
        "case": case,
        "n_tiles": recorded.arguments["TILE"].n_tiles.value,
        "registers": code.registers,
        "stack": code.stack,
        "shared": compiled.metadata.shared,
        "cooperative": compiled.metadata.launch_cooperative_grid,
        "loads": code.loads,
        "stores": code.stores,
    }


if __name__ == "__main__":
    with ProcessPoolExecutor() as pool:
        print(json.dumps(list(pool.map(compile_case, CASES))))

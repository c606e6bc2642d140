"""Compiles the kernels of given training steps for GPUs that are not there, and reads the machine code.

Run without TRITON_INTERPRET: `python tests/compile_kernels.py` prints one JSON object per kernel and target.
The launches are recorded from the real launching code on tensors of the meta device, so that the arguments' types,
divisibility and block sizes are those of a real run.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resnet_fast.ops import BatchNormArgs, launch
from resnet_fast.ops.arguments import Saved

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
}
STAGES = {64: 32, 128: 16, 256: 8, 512: 4}  # ResNet-18 with the 3x3 stem on 32x32 images: channels to map width
BATCH = 128
WRITTEN = {
    "normalize_kernel": ("y_ptr",),
    "reduce_kernel": ("dz_ptr",),
    "input_gradients_kernel": ("dx_ptr", "dresidual_ptr"),
}


def record_launches(n_channels: int, width: int, join: str, relu: bool, fork: bool) -> list[tuple]:
    """(kernel, arguments) of one training step of one fused operation in bf16, channels_last."""
    recorded = []
    original, launch.run = launch.run, lambda kernel, grid, **arguments: recorded.append((kernel, arguments))
    try:
        x = torch.empty(BATCH, n_channels, width, width, dtype=torch.bfloat16, device="meta")
        x = x.to(memory_format=torch.channels_last)
        vector = torch.empty(n_channels, device="meta")
        norm = BatchNormArgs(vector, vector, vector, vector, training=True)
        residual = None if join == "none" else x
        residual_norm = norm if join == "bn" else None
        y, relu_mask, mean, rstd, residual_mean, residual_rstd = launch.forward(x, norm, residual, residual_norm, relu)
        saved = Saved(
            x,
            relu_mask,
            mean,
            rstd,
            vector,
            vector,
            x if join == "bn" else None,
            residual_mean,
            residual_rstd,
            vector if join == "bn" else None,
            vector if join == "bn" else None,
        )
        launch.backward(y, y if fork else None, saved, join, relu, True, join == "bn")
    finally:
        launch.run = original
    return recorded


def signature(kernel, arguments: dict) -> tuple[dict, dict, dict]:
    """Types, constants and divisibility of a launch, as Triton's own launcher specializes them."""
    types, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[parameter.name] = "constexpr"
            constants[(position,)] = value
            continue
        if isinstance(value, torch.Tensor):
            types[parameter.name] = TYPES[value.dtype]
        elif parameter.annotation_type:
            types[parameter.name] = parameter.annotation_type
        else:
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def configurations() -> Iterator[tuple]:
    """The fused operations of ResNet-18 in bf16, channels_last: stem, first and second batch norm of each block."""
    for n_channels, width in STAGES.items():
        yield n_channels, width, "none", True, False
        yield n_channels, width, "add", True, True
        if n_channels > 64:
            yield n_channels, width, "bn", True, True
    yield 64, 32, "none", True, True  # the stem: no residual, two consumers
    yield 512, 4, "add", True, False  # the last block: one consumer


def compile_one(job: tuple) -> dict:
    configuration, index, arch = job
    kernel, arguments = record_launches(*configuration)[index]
    types, constants, attributes = signature(kernel, arguments)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.tiles.NUM_WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    images = {name for name, value in arguments.items() if getattr(value, "dtype", None) == torch.bfloat16}
    written = set(WRITTEN.get(kernel.__name__, ()))
    return {
        "kernel": kernel.__name__,
        "configuration": [str(part) for part in configuration],
        "arch": arch,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "loads": re.findall(r"LDG\.E\S*", sass),
        "stores": re.findall(r"STG\.E\S*", sass),
        # The 16-bit tensors that the launch reads and writes, whatever of them PTX accesses 2 bytes at a time, and the
        # type of their offsets.
        "images_read": len(images - written),
        "images_written": len(images & written),
        "narrow": len(re.findall(r"(?:ld|st)\.global\S*\.[bu]16", compiled.asm["ptx"])),
        "offsets": sorted(set(re.findall(r"addptr.*!tt\.ptr<bf16>>, tensor<\w+x(i\d+)>", compiled.asm["ttir"]))),
    }


def jobs(archs: list[int]) -> list[tuple]:
    """Every distinct specialization once."""
    seen, wanted = set(), []
    for configuration in configurations():
        for index, (kernel, arguments) in enumerate(record_launches(*configuration)):
            specialization = (kernel.__name__, str(signature(kernel, arguments)))
            if specialization not in seen:
                seen.add(specialization)
                wanted += [(configuration, index, arch) for arch in archs]
    return wanted


if __name__ == "__main__":
    with ProcessPoolExecutor() as pool:
        for row in pool.map(compile_one, jobs([80, 90])):
            print(json.dumps(row))

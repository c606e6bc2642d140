"""Predict kernels whose speed others have published: `TRITON_INTERPRET=0 python -m benchmarks.speed_model.validation`.

The kernels follow Triton's vector-addition tutorial and torch.compile's RMSNorm. The predictions stand next to the
published speeds in benchmarks/predicted/README.md.
"""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .gpus import GPUS
from .launches import Launch, parameter_offsets
from .simulate import Work, predict, read_code


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)


@triton.jit
def add_kernel(x_ptr, other_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    total = tl.load(x_ptr + offsets, mask=mask) + tl.load(other_ptr + offsets, mask=mask)
    tl.store(y_ptr + offsets, total, mask=mask)


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, y_ptr, n_columns, BLOCK: tl.constexpr):
    """Normalize one row per program: a loop for the mean square, and a second one that reads the row from the cache."""
    row = tl.program_id(0) * n_columns
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + offsets, mask=offsets < n_columns, other=0.0).to(tl.float32)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, axis=0) / n_columns + 1e-6)
    for start in range(0, n_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n_columns
        x = tl.load(x_ptr + row + offsets, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row + offsets, x * scale * weight, mask=mask)


def predict_gb_s(
    gpu: str,
    kernel: triton.JITFunction,
    images: dict[str, torch.Tensor],
    others: dict,
    grid: int,
    warps: int,
) -> float:
    """Return the bytes of the images / predicted time, in GB/s."""
    target = GPUTarget("cuda", GPUS[gpu].capability, 32)
    types, constants, attributes = Launch(kernel, images | others, (grid,)).signature(target)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    code = read_code(compiled.asm["cubin"], warps, compiled.metadata.shared)
    offsets = parameter_offsets(types, GPUS[gpu].capability)
    n_bytes = float(sum(image.nbytes for image in images.values()))
    reads = {offsets["x_ptr"]: images["x_ptr"].nbytes / grid}
    work = Work(grid, frozenset(offsets[name] for name in images), n_bytes, reads)
    us = predict(code, work, GPUS[gpu], in_l2=False).us
    return n_bytes / us / 1000


def main() -> None:
    for gpu, n in (("a100", 2**27), ("a100", 2**23), ("h200", 2**27)):
        x = torch.empty(n, device="meta")
        grid = n // 1024
        copied = predict_gb_s(gpu, copy_kernel, {"x_ptr": x, "y_ptr": x}, {"n": n, "BLOCK": 1024}, grid, 4)
        images = {"x_ptr": x, "other_ptr": x, "y_ptr": x}
        added = predict_gb_s(gpu, add_kernel, images, {"n": n, "BLOCK": 1024}, grid, 4)
        print(f"predicted, {gpu}, {n} elements of fp32: copy {copied:.0f} GB/s, addition {added:.0f} GB/s")
    for gpu, dtype in (("h200", torch.bfloat16), ("t4", torch.float16)):
        for columns in (4096, 8192):
            x = torch.empty(2**26 // columns, columns, dtype=dtype, device="meta")
            others = {"weight_ptr": x[0], "n_columns": columns, "BLOCK": 2048}
            speed = predict_gb_s(gpu, rms_norm_kernel, {"x_ptr": x, "y_ptr": x}, others, len(x), 8)
            print(f"predicted, {gpu}, RMSNorm of {len(x)}x{columns}, 16 bits: {speed:.0f} GB/s")


if __name__ == "__main__":
    main()

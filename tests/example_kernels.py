"""Kernels with the machine code that test_machine_code.py looks for, as JSON. Run without TRITON_INTERPRET."""

import json

import triton
import triton.language as tl
from compile_kernels import TARGETS, compile_for
from triton.compiler import ASTSource


@triton.jit
def matrix_product(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(c_ptr + offsets, tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)))


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """In a loop, 2 bytes at a time unless the addresses are known to be multiples of 16 bytes."""
    for start in range(0, n, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n, other=0.0), mask=offsets < n)


@triton.jit
def prefix_sums(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """A tile that no 32 registers hold."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, tl.cumsum(x * tl.sum(x, axis=0), axis=0) + x)


ALIGNED = [["tt.divisibility", 16]]
BLOCK = {"BLOCK": 1024}
SOURCES = {
    "matrix product": ASTSource(
        fn=matrix_product,
        signature={"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": 64},
    ),
    "narrow copy": ASTSource(
        fn=copy,
        signature={"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32", "BLOCK": "constexpr"},
        constexprs=BLOCK,
    ),
    "wide copy": ASTSource(
        fn=copy,
        signature={"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32", "BLOCK": "constexpr"},
        constexprs=BLOCK,
        attrs={(position,): ALIGNED for position in range(3)},
    ),
    "too large a tile": ASTSource(
        fn=prefix_sums,
        signature={"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": 16384},
    ),
}

if __name__ == "__main__":
    found = {
        f"{name}, {target}": compile_for(source, TARGETS[target], {"num_warps": 4})[1]._asdict()
        for name, source in SOURCES.items()
        for target in ("sm_75", "sm_90", "gfx1100")
    }
    print(json.dumps(found))

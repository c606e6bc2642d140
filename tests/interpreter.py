"""Mends Triton's interpreter (3.6, 3.7) where it computes what no GPU computes."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """All of the below, before a kernel runs."""
    _round_bfloat16_to_nearest()
    _sum_in_pairs()
    # Lanes that a mask or tl.where discards may hold anything, on a GPU in silence.
    np.seterr(over="ignore", divide="ignore", invalid="ignore")


def _round_bfloat16_to_nearest() -> None:
    """fp32 -> bf16 rounds to nearest, ties to even, as the machine instruction does; the interpreter cuts bits off.

    bf16 -> fp32 is exact; the interpreter gets denormals wrong.
    """
    original = interpreter._convert_float

    def convert(data, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32).reshape(data.shape) << 16
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(data, source, target, rounding_mode)
        bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded).reshape(data.shape)

    interpreter._convert_float = convert


def _sum_in_pairs() -> None:
    """tl.sum adds halves of a tile to each other, as lanes and warps do; the interpreter adds one after the other."""

    def tree_sum(self, input):
        data, axis = input.handle.data, self.axis
        if axis is None:
            data, axis = data.reshape(-1), 0
        while data.shape[axis] > 1:  # a power of two
            first, second = np.split(data, 2, axis)
            data = first + second
        keep = self.keep_dims
        data = data.reshape([1] * input.handle.data.ndim) if keep and self.axis is None else data
        return self.to_tensor(data if keep else np.squeeze(data, axis), input.dtype)

    interpreter.ReduceOps.sum = tree_sum

"""Mends Triton's interpreter (3.6, 3.7) where it computes what no GPU computes."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_bfloat16_to_nearest() -> None:
    """fp32 -> bf16 rounds to nearest, ties to even, as the machine instruction does; the interpreter cuts bits off."""
    original = interpreter._convert_float

    def convert(data, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(data, source, target, rounding_mode)
        bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded).reshape(data.shape)

    interpreter._convert_float = convert

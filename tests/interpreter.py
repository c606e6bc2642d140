"""Mends Triton's interpreter (3.6, 3.7) where it computes what no GPU computes, and watches the memory it touches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter

needs_interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="the accesses of compiled kernels cannot be watched"
)


def mend() -> None:
    """All of the below, before a kernel runs."""
    _round_bfloat16_to_nearest()
    _sum_in_pairs()
    _multiply_bfloat16()
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


def _multiply_bfloat16() -> None:
    """tl.dot of bf16: the interpreter multiplies its bits, as integers."""
    original = interpreter.InterpreterBuilder.create_dot

    def in_fp32(x):
        data = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self, a, b, *rest):
        return original(self, *(in_fp32(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


@contextmanager
def watched_memory(watch: Callable[[str, np.ndarray, int], None], virtual: bool = False) -> Iterator[None]:
    """Calls watch("read" or "written", addresses of the unmasked lanes, bytes per lane) before every access.

    `virtual` memory is never touched: it reads as `other` or zero, and forgets.
    """
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def observe(kind: str, pointers, mask):
        # Of a descriptor's block the mask comes as an array.
        watch(kind, pointers.data[np.asarray(mask.data)], pointers.get_element_ty().primitive_bitwidth // 8)
        return interpreter.TensorHandle(np.zeros_like(mask.data), mask.dtype) if virtual else mask

    def masked_load(pointers, mask, *rest, **hints):
        return load(pointers, observe("read", pointers, mask), *rest, **hints)

    def masked_store(pointers, value, mask, *rest):
        return store(pointers, value, observe("written", pointers, mask), *rest)

    def refuse(*_):
        raise NotImplementedError("atomics are not watched")

    with mock.patch.multiple(
        builder,
        create_masked_load=masked_load,
        create_masked_store=masked_store,
        create_atomic_cas=refuse,
        create_atomic_rmw=refuse,
    ):
        yield

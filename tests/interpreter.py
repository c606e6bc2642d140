"""Corrects Triton's interpreter (3.6, 3.7) where it differs from every GPU, and records the memory that it accesses."""

import functools
import inspect
import math
import threading
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
    _reduce_in_pairs()
    _multiply_bfloat16()
    _let_registers_be()
    _run_programs_together()
    _patch_the_language_once()
    _allow_what_is_discarded()


def _allow_what_is_discarded() -> None:
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


def _reduce_in_pairs() -> None:
    """Reductions combine halves of a tile, as lanes and warps do; the interpreter goes one element after the other."""

    def tree(tensors, axis, combine):
        while tensors[0].shape[axis] > 1:  # a power of two
            tensors = combine(*zip(*(np.split(data, 2, axis) for data in tensors), strict=True))
        return tensors

    def tree_sum(self, input):
        data, axis = input.handle.data, self.axis
        if axis is None:
            data, axis = data.reshape(-1), 0
        (data,) = tree([data], axis, lambda first, second: [first[0] + second[0]])
        keep = self.keep_dims
        data = data.reshape([1] * input.handle.data.ndim) if keep and self.axis is None else data
        return self.to_tensor(data if keep else np.squeeze(data, axis), input.dtype)

    def tree_reduce(self, input):
        def combine(first, second):
            halves = [
                self.to_tensor(data, x.dtype) for half in (first, second) for data, x in zip(half, input, strict=True)
            ]
            return [result.handle.data for result in self.combine_fn.fn(*halves)]

        assert self.axis is not None and not self.keep_dims
        reduced = tree([x.handle.data for x in input], self.axis, combine)
        return [self.to_tensor(np.squeeze(data, self.axis), x.dtype) for data, x in zip(reduced, input, strict=True)]

    interpreter.ReduceOps.sum = tree_sum
    interpreter.ReduceOps.generic_reduce = tree_reduce


def _multiply_bfloat16() -> None:
    """tl.dot of bf16: the interpreter multiplies its bits, as integers."""
    original = interpreter.InterpreterBuilder.create_dot

    def in_fp32(x):
        data = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self, a, b, *rest):
        return original(self, *(in_fp32(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _let_registers_be() -> None:
    """Inline assembly is not interpreted; that of kernels/batch_norm_single_read.py, x ^ 0, is x."""

    def xor_zero(self, assembly, constraints, values, types, is_pure, pack):
        x, zero = values
        assert assembly.startswith("xor.b32 $0, $1, $2;") and not zero.data.any()
        return mock.Mock(get_result=lambda index: x)

    interpreter.InterpreterBuilder.create_inline_asm = xor_zero


class Deadlock(RuntimeError):
    """All programs wait."""


class Together:
    """Runs the programs of one launch together: each in a thread of its own, one at a time, the turn passed on at every
    atomic. Else a program would wait at a barrier for others that start when it has ended.

    It takes the place of the kernel's function in the interpreter's loop over the grid, and runs at its last call.
    """

    current: "Together | None" = None  # the launch that is running

    def __init__(self, function: Callable) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.__signature__ = inspect.signature(function)
        self.programs: list[tuple[tuple, dict]] = []  # position in the grid, and arguments

    def __call__(self, **arguments) -> None:
        builder = interpreter.interpreter_builder
        self.programs.append((builder.grid_idx, arguments))
        if len(self.programs) < math.prod(builder.grid_dim):
            return
        self.turns = [threading.Semaphore(0) for _ in self.programs]
        self.alive = list(range(len(self.programs)))
        self.polls = 0  # atomics in a row that changed nothing, while no program ended
        self.error: BaseException | None = None
        threads = [threading.Thread(target=self._run, args=(number,)) for number in self.alive]
        Together.current = self
        try:
            for thread in threads:
                thread.start()
            self.turns[0].release()
            for thread in threads:
                thread.join()
        finally:
            Together.current = None
        if self.error is not None:
            raise self.error

    def _run(self, number: int) -> None:
        _allow_what_is_discarded()  # which each thread is told for itself
        self._wait(number)
        try:
            if self.error is None:
                self.function(**self.programs[number][1])
        except BaseException as error:
            self.error = self.error or error
        self.polls = 0
        after = self._next(number)
        self.alive.remove(number)
        if self.alive:
            self.turns[after].release()

    def _wait(self, number: int) -> None:
        self.turns[number].acquire()
        self.running = number
        interpreter.interpreter_builder.grid_idx = self.programs[number][0]

    def _next(self, number: int) -> int:
        return self.alive[(self.alive.index(number) + 1) % len(self.alive)]

    def pass_on(self, has_changed: bool) -> None:
        """Called behind an atomic of the running program, which ends here if another one has failed."""
        self.polls = 0 if has_changed else self.polls + 1
        if self.polls > 2 * len(self.alive):
            raise Deadlock(f"all of the {len(self.alive)} programs that are left wait for others")
        number = self.running
        self.turns[self._next(number)].release()
        self._wait(number)
        if self.error is not None:
            raise self.error


def _run_programs_together() -> None:
    """Those of kernels with a barrier (`Together`); of others one after the other, as Triton does."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    call, rmw = executor.__call__, builder.create_atomic_rmw

    def call_together(self, *args, **kwargs):
        function = self.fn
        if "barrier_ptr" in inspect.signature(function).parameters:
            self.fn = Together(function)
        try:
            return call(self, *args, **kwargs)
        finally:
            self.fn = function

    def rmw_and_pass_on(self, operation, pointer, value, *rest):
        result = rmw(self, operation, pointer, value, *rest)
        if Together.current is not None:
            Together.current.pass_on(has_changed=bool(value.data.any()))  # what is not 0 is added, or'd ...
        return result

    executor.__call__ = call_together
    builder.create_atomic_rmw = rmw_and_pass_on


def _patch_the_language_once() -> None:
    """The interpreter replaces hundreds of functions at every call of a @triton.jit function, half of its time.
    Nothing is compiled here, so they may stay replaced.
    """
    patch_lang = interpreter._patch_lang

    @functools.cache
    def patch_once(function):
        patch_lang(function)
        return interpreter._LangPatchScope()  # an empty one, which restores nothing

    interpreter._patch_lang = lambda function: patch_once(inspect.unwrap(function))


@contextmanager
def watched_memory(watch: Callable[[str, np.ndarray, int], None], virtual: bool = False) -> Iterator[None]:
    """Calls watch("read" or "written", addresses of the unmasked lanes, bytes per lane) before every access.

    `virtual` memory is never touched: it reads as `other` or zero, and forgets.
    """
    builder = interpreter.interpreter_builder
    load, store, rmw = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def observe(kind: str, pointers, mask):
        # Of a descriptor's block the mask comes as an array.
        lanes = np.asarray(mask.data).astype(bool)
        watch(kind, pointers.data[lanes], pointers.get_element_ty().primitive_bitwidth // 8)
        return interpreter.TensorHandle(np.zeros_like(mask.data), mask.dtype) if virtual else mask

    def masked_load(pointers, mask, *rest, **hints):
        return load(pointers, observe("read", pointers, mask), *rest, **hints)

    def masked_store(pointers, value, mask, *rest):
        return store(pointers, value, observe("written", pointers, mask), *rest)

    def refuse(*_):
        raise NotImplementedError("compare-and-swap is not watched")

    def watched_rmw(operation, pointers, value, mask, *rest):
        if virtual:
            raise NotImplementedError("atomics on virtual memory are not watched")
        observe("read", pointers, mask)
        return rmw(operation, pointers, value, observe("written", pointers, mask), *rest)

    with mock.patch.multiple(
        builder,
        create_masked_load=masked_load,
        create_masked_store=masked_store,
        create_atomic_cas=refuse,
        create_atomic_rmw=watched_rmw,
    ):
        yield

"""Kernels write all of their outputs and nothing else, and read nothing outside of their inputs."""

import contextlib
import functools
import itertools
from dataclasses import replace

import pytest
import torch
import triton
from fused_op import Case, make_operands, ours, results
from guard import guarded_memory
from interpreter import needs_interpreter
from ledger import ledger
from memory_cases import CASES, copy
from torch import Tensor

from resnet_fast.ops import launch, reference

PLAIN = Case("plain", (3, 20, 6, 5))
FORKED = replace(PLAIN, fork=True)
FAST = (
    *("odd channels", "one pixel per image", "one value per channel, evaluation"),
    *("a split of one row", "several tiles of channels", "ghost batches, the last of one image"),
)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def watched(function) -> tuple[dict[str, Tensor], set[str]]:
    """What `function` returns, and the names of the kernels that it launches.

    The guard and, where kernels are interpreted, the ledger find nothing, and the frames leave the result alone.
    """
    with ledger() if triton.knobs.runtime.interpret else contextlib.nullcontext(), guarded_memory() as kernels:
        found = function()
    expected = function()  # in bare memory, once the guard has let it pass
    assert found.keys() == expected.keys()
    for name in expected:
        assert not found[name].isnan().any(), name
        assert torch.equal(found[name], expected[name]), name
    return found, kernels


def check(case, dtype, join, relu, layout, device):
    operands = make_operands(case, dtype, layout, device)
    operation = functools.partial(ours, fork=case.fork, ghost=case.ghost)
    _, kernels = watched(functools.partial(results, operation, operands, join, relu, "triton"))
    data_kernels = {"normalize_kernel", "reduce_kernel", "input_gradients_kernel"}
    assert kernels >= data_kernels | ({"statistics_kernel"} if case.training else set())


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if str(case) in FAST else pytest.mark.slow) for case in CASES], ids=str
)
def test_corners(case, device):
    check(case, torch.bfloat16, "bn", True, "channels_last", device)


@pytest.mark.parametrize(
    "name", ("odd channels", pytest.param("7x7, several tiles and splits", marks=pytest.mark.slow))
)
def test_corners_in_nchw(name, device):
    (case,) = (case for case in CASES if str(case) == name)
    check(case, torch.bfloat16, "bn", True, "nchw", device)


@pytest.mark.parametrize(("join", "relu"), (("none", True), ("add", True), ("add", False)))
def test_joins(join, relu, device):
    check(FORKED, torch.bfloat16, join, relu, "channels_last", device)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "layout"), ((torch.float32, "nchw"), (torch.float64, "channels_last")), ids=str)
def test_other_types_and_one_handle(dtype, layout, device):
    for join, relu in itertools.product(("none", "add", "bn"), (True, False)):
        check(PLAIN, dtype, join, relu, layout, device)


def test_batch_statistics_beside_frozen_ones(device):
    check(replace(PLAIN, residual_training=False), torch.float32, "bn", True, "channels_last", device)


def test_the_variance_for_other_processes(device):
    """The launch of the synchronized batch norm, which alone asks for it."""
    x = make_operands(PLAIN, torch.float32, "channels_last", device).x

    def statistics() -> dict[str, Tensor]:
        var = x.new_empty(x.shape[1], dtype=torch.float64)
        return {"mean": launch.moments(x, var), "var": var}

    found, kernels = watched(statistics)
    assert kernels == {"statistics_kernel", "combine_statistics_kernel"}
    torch.testing.assert_close(
        found["var"].float(), reference.statistics(x)[1]
    )  # or another vector has come by its name


def test_the_guard_catches_what_is_wrong(device):
    x = torch.rand(10, device=device)
    with guarded_memory():
        copy(x, y := torch.empty_like(x))
        assert torch.equal(x, y)
        for wrong, message in (
            ({"n_elements": 11}, "wrote outside y_ptr"),
            ({"write_shift": -1}, "wrote outside y_ptr"),
            ({"n_elements": 9}, "left part of y_ptr unwritten"),
        ):
            with pytest.raises(AssertionError, match=message):
                copy(x, torch.empty_like(x), **wrong)
        with pytest.raises(AssertionError, match="changed y_ptr"):
            copy(x, torch.zeros_like(x))
        copy(x, y := torch.empty_like(x), read_shift=1)  # what is read outside is NaN in the result
        assert y.isnan().sum() == 1


@needs_interpreter
def test_the_ledger_catches_a_wrong_access():
    x = torch.rand(10)
    with ledger(), guarded_memory():  # whose frames leave room for what is wrong
        copy(x, torch.empty_like(x))
        for wrong in ({"n_elements": 11}, {"write_shift": -1}, {"read_shift": 1}):
            with pytest.raises(triton.runtime.errors.InterpreterError, match="inside no argument"):
                copy(x, torch.empty_like(x), **wrong)

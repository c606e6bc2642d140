"""Kernels write all of their outputs and nothing else, and read nothing outside of their inputs."""

import contextlib
import functools
import itertools
from dataclasses import replace

import pytest
import torch
import triton
from fused_op import LAYOUTS, Case, make_operands, ours, results
from guard import guarded_memory
from interpreter import needs_interpreter
from ledger import ledger
from memory_cases import CASES, copy
from torch import Tensor

from resnet_fast.ops import launch, reference
from resnet_fast.ops.arguments import BatchNormArgs

PLAIN = Case("plain", (3, 20, 6, 5))
FORKED = replace(PLAIN, fork=True)
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


@pytest.mark.parametrize("layout", ("channels_last", pytest.param("nchw", marks=pytest.mark.slow)))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_corners(case, layout, device):
    check(case, torch.bfloat16, "bn", True, layout, device)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", (PLAIN, FORKED), ids=("one handle", "two handles"))
def test_every_join(case, layout, device):
    for join, relu in itertools.product(("none", "add", "bn"), (True, False)):
        check(case, torch.bfloat16, join, relu, layout, device)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64), ids=str)
def test_other_types(dtype, layout, device):
    for join in ("none", "bn"):
        check(FORKED, dtype, join, True, layout, device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_statistics_beside_frozen_ones(layout, device):
    check(replace(PLAIN, residual_training=False), torch.float32, "bn", True, layout, device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_variance_for_other_processes(layout, device):
    """The launch of the synchronized batch norm, which alone asks for it."""
    x = make_operands(PLAIN, torch.float32, layout, device).x

    def statistics() -> dict[str, Tensor]:
        var = x.new_empty(x.shape[1], dtype=torch.float64)
        mean, rstd = launch.statistics(x, BatchNormArgs(None, None, training=True), var=var)
        return {"mean": mean, "rstd": rstd, "var": var}

    found, kernels = watched(statistics)
    assert kernels == {"statistics_kernel", "combine_statistics_kernel"}
    torch.testing.assert_close(
        found["var"].float(), reference.statistics(x)[1]
    )  # or another vector has come by its name


@pytest.mark.parametrize(
    ("wrong", "message"),
    (
        ({"n_elements": 11}, "wrote outside y_ptr"),
        ({"write_shift": -1}, "wrote outside y_ptr"),
        ({"n_elements": 9}, "left part of y_ptr unwritten"),
    ),
)
def test_the_guard_catches_one_wrong_write(wrong, message, device):
    x = torch.rand(10, device=device)
    with guarded_memory():
        copy(x, y := torch.empty_like(x))
        assert torch.equal(x, y)
        with pytest.raises(AssertionError, match=message):
            copy(x, torch.empty_like(x), **wrong)


def test_the_guard_catches_an_input_that_changes(device):
    with guarded_memory(), pytest.raises(AssertionError, match="changed y_ptr"):
        copy(torch.rand(10, device=device), torch.zeros(10, device=device))


@pytest.mark.parametrize("shift", (-1, 1))
def test_a_value_read_outside_is_nan_in_the_result(shift, device):
    x = torch.rand(10, device=device)
    with guarded_memory():
        copy(x, y := torch.empty_like(x), read_shift=shift)
    assert y.isnan().sum() == 1


@needs_interpreter
@pytest.mark.parametrize(
    "wrong", ({"n_elements": 11}, {"write_shift": -1}, {"read_shift": -1}, {"read_shift": 1}), ids=str
)
def test_the_ledger_catches_one_wrong_access(wrong):
    x = torch.rand(10)
    with ledger(), guarded_memory():  # whose frames leave room for what is wrong
        copy(x, torch.empty_like(x))
        with pytest.raises(triton.runtime.errors.InterpreterError, match="inside no argument"):
            copy(x, torch.empty_like(x), **wrong)

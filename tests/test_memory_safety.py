"""Kernels write all of their outputs and nothing else, and read nothing outside of their inputs."""

import contextlib
import itertools

import pytest
import torch
import triton
from fused_op import LAYOUTS, Case, make_operands, ours, results
from guard import guarded_memory
from interpreter import needs_interpreter
from ledger import ledger
from memory_cases import CASES, copy

from resnet_fast.functional import batch_norm_add_relu

PLAIN = Case("plain", (3, 20, 6, 5))
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def forked(x, residual, norms, join, relu, backend):
    """The operation with two handles, both used."""
    first, second = batch_norm_add_relu(
        x,
        *norms[0],
        residual=None if join == "none" else residual,
        residual_norm=norms[1] if join == "bn" else None,
        relu=relu,
        fork=True,
        backend=backend,
    )
    return first + 2 * second


def residual_frozen(x, residual, norms, join, relu, backend):
    return ours(x, residual, [norms[0], norms[1]._replace(training=False)], join, relu, backend)


def check(operation, case, dtype, join, relu, layout, device):
    """The guard and, where kernels are interpreted, the ledger find nothing, and the frames leave the result alone."""
    operands = make_operands(case, dtype, layout, device)
    with ledger() if triton.knobs.runtime.interpret else contextlib.nullcontext(), guarded_memory() as kernels:
        found = results(operation, operands, join, relu, "triton")
    expected = results(operation, operands, join, relu, "triton")  # in bare memory, once the guard has let it pass
    data_kernels = {"normalize_kernel", "reduce_kernel", "input_gradients_kernel"}
    assert kernels >= data_kernels | ({"statistics_kernel"} if case.training else set())
    for name in expected:
        assert not found[name].isnan().any(), name
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("join", ("none", "bn"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_corners(case, join, layout, device):
    check(ours, case, torch.bfloat16, join, True, layout, device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", (ours, forked), ids=("one handle", "two handles"))
def test_every_join(operation, layout, device):
    for join, relu in itertools.product(("none", "add", "bn"), (True, False)):
        check(operation, PLAIN, torch.bfloat16, join, relu, layout, device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64), ids=str)
def test_other_types(dtype, layout, device):
    for join in ("none", "bn"):
        check(forked, PLAIN, dtype, join, True, layout, device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_statistics_beside_frozen_ones(layout, device):
    check(residual_frozen, PLAIN, torch.float32, "bn", True, layout, device)


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

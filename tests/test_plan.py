"""A plan repeats its recorded launches bit for bit, or leaves them to Triton."""

import ctypes
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import needs_interpreter
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton import knobs

from resnet_fast import FusedBatchNorm2d, functional
from resnet_fast.ops import choices, launch, plan

pytestmark = needs_interpreter

REPETITIONS: list[str] = []  # the kernels that plans have launched
KERNELS: dict[Any, SimpleNamespace] = {}  # what a compiled kernel has that an interpreted one has not
GLOBALS: dict[str, Any] = {}  # of the kernels' module


class Compiled:
    """Stands for a compiled kernel: runs the interpreted one on memory at the addresses that it gets."""

    def __init__(self, kernel: Any, arguments: dict[str, Any]) -> None:
        self.kernel, self.function, self.packed_metadata = kernel, None, None
        self.types = {name: value.dtype for name, value in arguments.items() if isinstance(value, Tensor)}

    def run(self, x: int, y: int, z: int, stream, function, metadata, entering, enter, leave, *values: Any) -> None:
        arguments = dict(zip(self.kernel.arg_names, values, strict=True))
        for name, dtype in self.types.items():
            address = (ctypes.c_char * 8).from_address(arguments[name])
            arguments[name] = torch.frombuffer(address, dtype=dtype, count=1)
        REPETITIONS.append(self.kernel.fn.__name__)
        self.kernel[(x, y, z)](**arguments)


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch) -> Iterator[None]:
    def note(kernel: Any, grid: tuple, arguments: dict[str, Any], _) -> None:
        stand_in = KERNELS.setdefault(
            kernel,
            SimpleNamespace(
                arg_names=kernel.arg_names,
                hash="a hash",
                pre_run_hooks=[],
                used_global_vals={("UNIT", 0): (1, GLOBALS)},
            ),
        )
        plan.note(stand_in, grid, arguments, Compiled(kernel, arguments))

    device = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda index: 0)
    monkeypatch.setattr(launch, "note", note)
    monkeypatch.setattr(plan, "driver", SimpleNamespace(active=device))
    monkeypatch.setattr(functional, "_calls", {})
    monkeypatch.setitem(GLOBALS, "UNIT", 1)
    KERNELS.clear()
    REPETITIONS.clear()
    yield


def images(n: int, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(n)]


def step(
    norms: list[FusedBatchNorm2d], join: str, fork: bool, relu: bool, tensors: list[Tensor]
) -> dict[str, Tensor | None]:
    """Results and gradients of a pass, and running statistics after it."""
    x, residual, dy, dy_alias = tensors
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    given = (residual, norms[1]) if join == "bn" else (residual, None) if join == "add" else (None, None)
    for norm in norms:
        norm.zero_grad(set_to_none=True)
    y = norms[0].fused(x, *given, relu=relu, fork=fork)
    y, alias = y if fork else (y, None)
    torch.autograd.backward([y] if alias is None else [y, alias], [dy] if alias is None else [dy, dy_alias])
    found = {"y": y.detach(), "dx": x.grad, "dresidual": residual.grad}
    for place, norm in enumerate(norms):
        found |= {f"{name} {place}": buffer.clone() for name, buffer in norm.named_buffers()}
        found |= {f"d {name} {place}": parameter.grad for name, parameter in norm.named_parameters()}
    return found


def norms(n_channels: int, **options: Any) -> list[FusedBatchNorm2d]:
    torch.manual_seed(0)
    found = [FusedBatchNorm2d(n_channels, **options) for _ in range(2)]
    for norm in found:
        if norm.weight is not None:
            torch.nn.init.normal_(norm.weight)
    return found


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        other = expected[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            assert value.stride() == other.stride() and torch.equal(value, other), name


CASES = {
    "BN+ReLU": ("none", False, True, {}),
    "BN+ReLU, forked": ("none", True, True, {}),
    "BN+add": ("add", False, False, {}),
    "BN+add+ReLU": ("add", False, True, {}),
    "BN+add+ReLU, forked": ("add", True, True, {}),
    "BN+BN+add+ReLU": ("bn", True, True, {}),
    "ghost batches": ("bn", True, True, {"ghost_batch_size": 2}),
    "without parameters and statistics": ("bn", True, True, {"affine": False, "track_running_stats": False}),
}


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize(
    ("n_channels", "dtype", "layout"),
    (
        (16, torch.bfloat16, torch.channels_last),
        (5, torch.float32, torch.contiguous_format),
    ),
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_a_replay_has_the_bits_of_the_first_pass(case, n_channels, dtype, layout, training):
    join, fork, relu, options = CASES[case]
    shape = (5, n_channels, 2, 2)
    first, second = (images(4, shape, dtype, layout) for _ in range(2))
    second = [tensor.flip(0).contiguous(memory_format=layout) for tensor in second]
    planned, unplanned = (norms(n_channels, **options) for _ in range(2))
    for norm in (*planned, *unplanned):
        norm.train(training)
    step(planned, join, fork, relu, first)
    with choices.using({}):  # of which plans know nothing
        step(unplanned, join, fork, relu, first)
        expected = step(unplanned, join, fork, relu, second)
    assert REPETITIONS == []
    assert_same(step(planned, join, fork, relu, second), expected)
    assert {"normalize_kernel", "input_gradients_kernel"} <= set(REPETITIONS)


def forward_and_backward(norm: FusedBatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_() if x.data_ptr() % 16 == 0 else x.requires_grad_()
    y = norm(x)
    y.sum().backward()  # whose gradient is expanded
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.fixture
def planned() -> tuple[FusedBatchNorm2d, Tensor]:
    """A norm whose plan has both passes, and its input."""
    norm, (x,) = FusedBatchNorm2d(8, relu=True), images(1, (4, 8, 2, 2), torch.float32, torch.channels_last)
    for _ in range(3):
        forward_and_backward(norm, x)
    REPETITIONS.clear()
    forward_and_backward(norm, x)
    assert REPETITIONS == ["statistics_kernel", "normalize_kernel", "reduce_kernel", "input_gradients_kernel"]
    REPETITIONS.clear()
    return norm, x


def assert_left_to_triton(norm: FusedBatchNorm2d, x: Tensor) -> None:
    found = forward_and_backward(norm, x.clone(memory_format=torch.preserve_format))
    assert REPETITIONS == []
    with choices.using({}):
        expected = forward_and_backward(norm, x.clone(memory_format=torch.preserve_format))
    assert all(map(torch.equal, found, expected))


def test_a_profilers_hook_hears_of_every_launch(planned, monkeypatch):
    hook = knobs.HookChain()
    hook.add(lambda metadata: None)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
    assert_left_to_triton(*planned)


def test_debugging_leaves_launches_to_triton(planned, monkeypatch):
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert_left_to_triton(*planned)


def test_a_kernel_that_has_changed_is_not_repeated(planned):
    for kernel in KERNELS.values():
        kernel.hash = None
    assert_left_to_triton(*planned)


def test_a_hook_of_a_kernel_is_run(planned):
    for kernel in KERNELS.values():
        kernel.pre_run_hooks.append(print)
    assert_left_to_triton(*planned)


def test_a_changed_global_leaves_launches_to_triton(planned, monkeypatch):
    monkeypatch.setitem(GLOBALS, "UNIT", 2)
    assert_left_to_triton(*planned)


def test_another_current_device_leaves_launches_to_triton(planned, monkeypatch):
    norm, x = planned
    monkeypatch.setattr(functional, "_calls", {})
    monkeypatch.setattr(plan.driver.active, "get_current_device", lambda: 1)
    for _ in range(3):
        forward_and_backward(norm, x)
    assert REPETITIONS == []


def test_addresses_that_are_no_multiples_of_16_leave_launches_to_triton(planned):
    norm, x = planned
    memory = torch.empty(x.numel() + 1)
    shifted = memory[1:].as_strided(x.shape, x.stride(), 1).copy_(x)
    assert shifted.data_ptr() % 16 == 4
    forward_and_backward(norm, shifted)
    assert "normalize_kernel" not in REPETITIONS


def test_a_gradient_is_made_dense(planned):
    norm, x = planned
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(torch.ones(8, 4, 2, 2).transpose(0, 1))
    assert REPETITIONS[2:] == ["reduce_kernel", "input_gradients_kernel"]


def test_saved_tensors_of_another_layout(planned):
    norm, x = planned
    expected = forward_and_backward(norm, x)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)
    ):
        REPETITIONS.clear()
        found = forward_and_backward(norm, x)
    assert REPETITIONS == ["statistics_kernel", "normalize_kernel"]
    assert all(map(torch.equal, found, expected))


def test_second_derivatives_of_a_replay(planned):
    norm, x = planned

    def penalty() -> Tensor:
        own = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(norm(own).square().sum(), own, create_graph=True)
        (second,) = torch.autograd.grad(dx.square().sum(), own)
        return second

    found = penalty()
    assert REPETITIONS[:2] == ["statistics_kernel", "normalize_kernel"]
    with choices.using({}):
        assert torch.equal(found, penalty())


def test_arguments_that_were_one_tensor_when_recorded():
    """A recording knows arguments by their place, not by the tensor that stood there."""
    x, residual, dy, dy_alias = images(4, (4, 8, 2, 2), torch.float32, torch.channels_last)

    def passes(norm: FusedBatchNorm2d, first: Tensor, second: Tensor, gradients: list[Tensor]) -> dict:
        first, second = first.detach().requires_grad_(), second.detach().requires_grad_()
        y, alias = norm.fused(first, first if second.data_ptr() == first.data_ptr() else second, relu=True, fork=True)
        torch.autograd.backward([y, alias], gradients)
        return {"y": y.detach(), "dx": first.grad, "dresidual": second.grad}

    norm = FusedBatchNorm2d(8)
    for _ in range(3):
        passes(norm, x, x, [dy, dy])
    REPETITIONS.clear()
    found = passes(norm, x, residual, [dy, dy_alias])
    assert REPETITIONS
    with choices.using({}):
        assert_same(found, passes(FusedBatchNorm2d(8), x, residual, [dy, dy_alias]))


def test_checkpointed_activations_from_the_first_step():
    """Of the forward that is recorded, and of its recomputation, which repeats it."""
    (x,) = images(1, (4, 8, 2, 2), torch.float32, torch.channels_last)
    for _ in range(2):
        found = []
        for use_checkpoint in (True, False):
            norm, own = FusedBatchNorm2d(8, relu=True), x.clone().requires_grad_()
            y = checkpoint(norm, own, use_reentrant=False) if use_checkpoint else norm(own)
            y.square().sum().backward()
            found.append((y.detach(), own.grad, norm.weight.grad))
        assert all(map(torch.equal, *found))


def test_checkpointing_while_a_debugger_comes_and_goes(planned, monkeypatch):
    norm, x = planned
    own = x.clone().requires_grad_()
    y = checkpoint(norm, own, use_reentrant=False)
    monkeypatch.setattr(knobs.runtime, "debug", True)
    y.square().sum().backward()


def test_saved_tensors_of_another_type(planned):
    norm, x = planned

    def pack(tensor: Tensor) -> Tensor:
        return tensor.to(torch.float64) if tensor.dtype == torch.float32 else tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, pack):
        REPETITIONS.clear()
        norm(x.clone().requires_grad_()).sum().backward()
    assert REPETITIONS == ["statistics_kernel", "normalize_kernel"]


def test_momentum_is_no_part_of_a_kind():
    norm, (x,) = FusedBatchNorm2d(8, momentum=None), images(1, (4, 8, 2, 2), torch.float32, torch.channels_last)
    expected = torch.nn.BatchNorm2d(8, momentum=None)
    for _ in range(4):
        norm(x)
        expected(x)
    assert len(functional._calls) == 1 and REPETITIONS == 3 * ["statistics_kernel", "normalize_kernel"]
    torch.testing.assert_close(norm.running_mean, expected.running_mean)


def test_a_trace_has_no_plan(planned):
    norm, x = planned
    with torch.no_grad():
        traced = torch.jit.trace(norm.eval(), x, check_trace=False)
        other = x.flip(0).contiguous(memory_format=torch.channels_last)
        assert torch.equal(traced(other), norm(other))


def test_a_tensor_that_has_left_a_transform(planned):
    norm, x = planned
    left = []
    torch.func.grad(lambda t: (left.append(t), t.sum())[1])(x)
    assert torch.equal(norm(left[0]), norm(x))


def test_two_backwards_of_one_graph(planned):
    norm, x = planned
    x = x.clone().requires_grad_()
    y = norm(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_plan_for_a_dispatch_mode(planned):
    from torch.utils.flop_counter import FlopCounterMode

    norm, x = planned
    with FlopCounterMode(display=False):
        forward_and_backward(norm, x)
    assert REPETITIONS == []


def test_arguments_of_another_kind_are_checked(planned):
    norm, x = planned
    norm.running_mean.resize_(7)
    with pytest.raises(RuntimeError, match=r"running_mean must have shape \(8,\), got \(7,\)"):
        norm(x)
    with pytest.raises(TypeError, match="ghost_batch_size must be an int or None, got True"):
        functional.batch_norm_add_relu(x, None, None, training=True, ghost_batch_size=True)


def test_kinds_are_bounded(planned, monkeypatch):
    norm, x = planned
    monkeypatch.setattr(functional, "MAX_CALLS", 3)
    for eps in range(1, 10):
        norm.eps = eps / 10
        norm(x)
    assert len(functional._calls) == 3


def test_a_plan_keeps_no_tensor_alive():
    norm, (x,) = FusedBatchNorm2d(8, relu=True), images(1, (4, 8, 2, 2), torch.float32, torch.channels_last)
    for _ in range(3):
        forward_and_backward(norm, x)
    x_alive, norm_alive = weakref.ref(x), weakref.ref(norm.weight)
    del x, norm
    assert x_alive() is None and norm_alive() is None

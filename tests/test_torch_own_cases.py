"""On torch's own tests of its batch norm (torch.testing._internal), ours behaves like torch's.

The samples are those of the installed torch: OpInfo for the function, ModuleInfo for the module. Outputs, gradients,
running statistics and errors, on both backends.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from budget import ROUNDINGS, assert_within_budget
from fused_op import Operands, magnitudes
from torch import Tensor, nn

from resnet_fast import FusedBatchNorm2d
from resnet_fast.functional import BatchNormArgs, batch_norm_add_relu

NAMES = ("x", "running_mean", "running_var", "weight", "bias")


@pytest.fixture(scope="module")
def op_infos():
    pytest.importorskip("expecttest", reason="torch.testing._internal imports expecttest: pip install expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    found = [op for op in op_db if op.name == "nn.functional.batch_norm"]
    assert found
    return found


@pytest.fixture(scope="module")
def module_info():
    pytest.importorskip("expecttest", reason="torch.testing._internal imports expecttest: pip install expecttest")
    from torch.testing._internal.common_modules import module_db

    (found,) = (info for info in module_db if info.module_cls is nn.BatchNorm2d)
    return found


def gradient_like(y: Tensor) -> Tensor:
    """The same for every type, and exact in each: sixteenths."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-16, 17, y.shape, generator=generator).to(y.device, y.dtype) / 16


def outcome(function, tensors: list[Tensor | None], options: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """y, the gradients and the running statistics of one call on copies of `tensors`, in `dtype`."""
    leaves = {name: tensor for name, tensor in zip(NAMES, tensors, strict=True) if tensor is not None}
    leaves = {
        name: tensor.detach().clone().to(dtype).requires_grad_(tensor.requires_grad) for name, tensor in leaves.items()
    }
    y = function(*(leaves.get(name) for name in NAMES), **options)
    y.backward(gradient_like(y))
    found = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"y": y.detach()} | found | {name: leaf for name, leaf in leaves.items() if name.startswith("running")}


def sums_of_terms(x: Tensor, norm: BatchNormArgs) -> dict[str, Tensor]:
    """`magnitudes` of a sample of any shape, of values that nobody chose."""
    image = x.detach().reshape(*x.shape[:2], -1, 1)
    norm = norm._make(value.detach() if isinstance(value, Tensor) else value for value in norm)
    operands = Operands(image, torch.zeros_like(image), [norm, norm], gradient_like(x).view_as(image))
    found = magnitudes(operands, "none", roundings=ROUNDINGS)
    return found | {name: found[name].view_as(x) for name in ("y", "dx")}


def assert_outcomes_agree(case: str, found: dict, expected: dict, exact: dict, added: dict) -> None:
    assert found.keys() == expected.keys(), case
    for name, theirs in expected.items():
        label, ours = f"{case}: {name}", found[name]
        assert ours.stride() == theirs.stride(), label
        if theirs.dtype == torch.float64:  # sums of at most 125 terms in another order; nothing is more exact
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda text, n=label: f"{n}: {text}")
        elif theirs.numel() == 0 or not theirs.is_floating_point():
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), label
        else:
            assert_within_budget(label, ours, theirs, exact[name], added.get(name))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    (pytest.param("triton", torch.float32, marks=pytest.mark.slow), ("aten", torch.bfloat16)),
    ids=str,
)
def test_samples_of_the_function(backend, dtype, op_infos, device):
    n_samples = 0
    for op in op_infos:
        if dtype not in op.supported_dtypes(device.type):  # the variant without cuDNN has none on a CPU
            continue
        with torch.backends.cudnn.flags(enabled=op.variant_test_name != "without_cudnn"):
            for sample in op.sample_inputs(device, dtype, requires_grad=True):
                tensors, options = [sample.input, *sample.args], sample.kwargs
                ours = dict(relu=False, backend=backend if sample.input.numel() else None)
                found = outcome(batch_norm_add_relu, tensors, options | ours, dtype)
                expected = outcome(F.batch_norm, tensors, options, dtype)
                exact = outcome(F.batch_norm, tensors, options, torch.float64)
                added = {}
                if sample.input.numel():
                    added = sums_of_terms(sample.input, BatchNormArgs(*sample.args, **options))
                case = f"{op.full_name} {tuple(sample.input.shape)} {options}"
                assert_outcomes_agree(case, found, expected, exact, added)
                n_samples += 1
    assert n_samples > 0


def test_error_samples_of_the_function(op_infos, device):
    samples = [error for op in op_infos if op.error_inputs_func is not None for error in op.error_inputs(device)]
    if not samples:
        pytest.skip("the installed torch has none for batch norm")
    for error in samples:
        with pytest.raises(error.error_type, match=error.error_regex):
            batch_norm_add_relu(error.sample_input.input, *error.sample_input.args, **error.sample_input.kwargs)


def one_pass(module: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """The output, the gradients and all buffers after one forward and backward."""
    module.zero_grad()
    x = batch.detach().clone().requires_grad_()
    y = module(x)
    y.backward(gradient_like(y))
    found = {"y": y.detach(), "dx": x.grad} | {f"d{name}": p.grad for name, p in module.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize(
    ("backend", "training", "dtype"),
    (("triton", True, torch.float16), ("triton", False, torch.float32), ("aten", True, torch.float32)),
    ids=str,
)
def test_samples_of_the_module(backend, training, dtype, module_info, device, request):
    if backend == "aten":
        request.getfixturevalue("on_aten")
    torch.manual_seed(0)
    samples = module_info.module_inputs_func(
        module_info, device=device, dtype=dtype, requires_grad=True, training=training
    )
    assert samples
    for sample in samples:
        construct, forward = sample.constructor_input, sample.forward_input
        theirs, ours = (
            module(*construct.args, **construct.kwargs, device=device, dtype=dtype).train(training)
            for module in (nn.BatchNorm2d, FusedBatchNorm2d)
        )
        for parameter in theirs.parameters():
            nn.init.uniform_(parameter, -1, 1)
        assert repr(ours) == "Fused" + repr(theirs)
        (x,) = forward.args
        for batch in (x.detach(), 1 - x.detach() / 2):
            ours.load_state_dict(theirs.state_dict())
            exact = one_pass(copy.deepcopy(theirs).double(), batch.double())
            added = sums_of_terms(batch, ours.arguments()) if batch.numel() else {}
            found, expected = (one_pass(module, batch) for module in (ours, theirs))
            assert_outcomes_agree(f"{sample.desc} {construct.args} {construct.kwargs}", found, expected, exact, added)


def test_error_samples_of_the_module(module_info, device):
    samples = module_info.module_error_inputs_func(
        module_info, device=device, dtype=torch.float32, requires_grad=False, training=True
    )
    assert samples
    for sample in samples:
        construct, forward = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        module = FusedBatchNorm2d(*construct.args, **construct.kwargs, device=device)
        with pytest.raises(sample.error_type, match=sample.error_regex):
            module(*forward.args, **forward.kwargs)

"""torch.export gives a program with the outputs, gradients and buffers of the module, in ATen operators."""

import copy

import pytest
import torch
from thin_resnet import images, pair
from torch import nn

from resnet_fast import FusedBatchNorm2d
from resnet_fast.functional import batch_norm_add_relu


class Block(nn.Module):
    """Both joins and the fused fork, as the network uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = (FusedBatchNorm2d(8) for _ in range(3))

    def forward(self, x):
        y, alias = self.first.fused(x, relu=True, fork=True)
        return self.second.fused(y, alias, self.shortcut, relu=True)


MODULES = {
    "batch norm": lambda: FusedBatchNorm2d(8),
    "batch norm + ReLU": lambda: FusedBatchNorm2d(8, relu=True),
    "no affine, no statistics": lambda: FusedBatchNorm2d(8, affine=False, track_running_stats=False),
    "block": Block,
}


def outcome(module, x) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    gradients = {f"d{name}": parameter.grad for name, parameter in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad} | gradients | dict(module.named_buffers())


def assert_program_agrees(module, x, strict: bool) -> None:
    program = torch.export.export(copy.deepcopy(module), (x,), strict=strict)
    used = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert not any("resnet_fast" in str(target) for target in used)
    found, expected = outcome(program.module(), x), outcome(module, x)
    dropped = expected.keys() - found.keys()  # strict export drops what the forward does not read
    assert found.keys() <= expected.keys() and all(name.endswith("num_batches_tracked") for name in dropped)
    for name in found:  # fp64: the sums of several layers in another order
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("name", "training", "strict"),
    (
        ("batch norm", True, True),
        ("batch norm + ReLU", False, False),
        ("no affine, no statistics", True, False),
        ("block", True, False),
        ("block", False, True),
    ),
)
def test_module(name, training, strict, device):
    module = MODULES[name]().to(device, torch.float64).train(training)
    assert_program_agrees(module, torch.randn(3, 8, 4, 5, dtype=torch.float64, device=device), strict)


def test_network(device):
    model, _ = pair(device, torch.float64)
    assert_program_agrees(model, images(device, torch.float64), strict=False)


def test_a_program_is_saved_and_loaded(tmp_path, device):
    module = FusedBatchNorm2d(8, relu=True).to(device)
    x = torch.randn(3, 8, 4, 5, device=device)
    program = torch.export.export(copy.deepcopy(module), (x,))
    torch.export.save(program, tmp_path / "module.pt2")
    loaded = torch.export.load(tmp_path / "module.pt2").module()
    assert torch.equal(loaded(x), program.module()(x))


def test_any_number_of_images(device):
    module = FusedBatchNorm2d(8, relu=True).to(device, torch.float64)
    images = torch.export.Dim("images", min=2)
    x = torch.randn(5, 8, 4, 5, dtype=torch.float64, device=device)
    program = torch.export.export(copy.deepcopy(module), (x[:3],), dynamic_shapes=({0: images},))
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-12, atol=1e-12)


def test_triton_by_name_says_why_not(device):
    class Named(nn.Module):
        def forward(self, x):
            return batch_norm_add_relu(x, None, None, training=True, backend="triton")

    with pytest.raises(RuntimeError, match="backend 'triton' was asked for, but torch.export needs ATen operators"):
        torch.export.export(Named(), (torch.randn(3, 8, 4, 5, device=device),), strict=False)

"""Two runs give the same bits: no atomics, every sum in a fixed order."""

from functools import partial

import pytest
import torch
from fused_op import Case, make_operands, ours, results
from thin_resnet import images, thin_resnet

from resnet_fast.models import resnet

# Several tiles and splits, the last ones not full; more on a GPU, where programs run side by side.
SHAPE = (16, 136, 29, 29) if torch.cuda.is_available() else (2, 24, 9, 9)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("triton", "aten"))
@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)), ids=str)
def test_operation(dtype, layout, backend, device):
    for join, fork in (("none", False), ("add", True), ("bn", True)):
        operands = make_operands(Case("several splits", SHAPE, fork=fork), dtype, layout, device)
        first, second = (results(partial(ours, fork=fork), operands, join, True, backend) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), (join, fork, name)


@pytest.mark.gpu
def test_training_step(device):
    def step() -> list[torch.Tensor]:
        model = thin_resnet(resnet).to(device)
        model(images(device)).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()] + list(model.buffers())

    # cuDNN's default weight gradients use atomics; they are not what is tested here.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for first, second in zip(step(), step(), strict=True):
            assert torch.equal(first, second)

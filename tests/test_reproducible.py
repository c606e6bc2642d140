"""Two runs are bit-identical: no atomics, and every sum in a fixed order."""

from functools import partial

import pytest
import torch
from fused_op import Case, make_operands, ours, results
from thin_resnet import images, thin_resnet

from resnet_fast.models import resnet

# Several tiles and splits, the last ones not full; more on a GPU, where programs run side by side.
SHAPE = (16, 136, 29, 29) if torch.cuda.is_available() else (2, 24, 9, 9)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("join", "layout", "backend"),
    (("none", "nchw", "triton"), ("bn", "channels_last", "triton"), ("bn", "nchw", "aten")),
)
def test_operation(join, layout, backend, device):
    operands = make_operands(Case("several splits", SHAPE, fork=True), torch.bfloat16, layout, device)
    first, second = (results(partial(ours, fork=True), operands, join, True, backend) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


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

"""With torch.utils.checkpoint, which runs the forward twice, statistics and gradients equal torch's."""

import pytest
import torch
from thin_resnet import images, pair
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from resnet_fast import FusedBatchNorm2d


@pytest.mark.parametrize("use_reentrant", (True, False), ids=("reentrant", "not reentrant"))
@pytest.mark.parametrize("options", ({"momentum": None}, {"track_running_stats": False}), ids=str)
def test_module(options, use_reentrant, device):
    outcomes = []
    for norm in (FusedBatchNorm2d, nn.BatchNorm2d):
        module = norm(3, **options).to(device, torch.float64)
        x = torch.linspace(-1, 3, 96, dtype=torch.float64, device=device).view(2, 3, 4, 4).requires_grad_()
        checkpoint(module, x, use_reentrant=use_reentrant).pow(3).sum().backward()
        outcomes.append([x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        if options.get("track_running_stats", True):
            assert module.num_batches_tracked == 2, "counted twice, as torch does"
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-12)  # fp64, sums of 32 terms


@pytest.mark.parametrize("use_reentrant", (True, False), ids=("reentrant", "not reentrant"))
def test_stages_of_a_network(use_reentrant, on_aten, device):
    outcomes = []
    for model in pair(device, torch.float64):
        x = model.bn1(model.conv1(images(device, torch.float64)))
        x = checkpoint_sequential(model.layer1, 2, x, use_reentrant=use_reentrant)
        x = checkpoint(model.layer2, x, use_reentrant=use_reentrant)
        x.square().sum().backward()
        gradients = [p.grad for name, p in model.named_parameters() if not name.startswith("fc")]
        outcomes.append([*gradients, *model.buffers()])
        # checkpoint_sequential keeps its last segment: the second block is run once
        counts = [int(norm.num_batches_tracked) for norm in (model.bn1, model.layer1[0].bn2, model.layer1[1].bn1)]
        assert counts == [1, 2, 1] and model.layer2[0].downsample[1].num_batches_tracked == 2
    torch.testing.assert_close(*outcomes, rtol=1e-10, atol=1e-10)  # fp64: seven layers' sums


def test_frozen_statistics_are_not_updated(device):
    module = FusedBatchNorm2d(3).to(device).eval()
    checkpoint(module, torch.randn(2, 3, 4, 4, device=device), use_reentrant=False).sum().backward()
    assert module.num_batches_tracked == 0 and not module.running_mean.any()

"""model.half(), model.bfloat16() and low-precision data with fp32 parameters give the same types as torch."""

import pytest
import torch
from budget import assert_within_budget
from thin_resnet import images, pair
from torch import nn

from resnet_fast import FusedBatchNorm2d

CONVERSIONS = {
    "half": (nn.Module.half, torch.float16),
    "bfloat16": (nn.Module.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_converted_network(conversion, device):
    """The types of everything, and logits about as far from exact as torchvision's."""
    convert, dtype = CONVERSIONS[conversion]
    ours, theirs = (convert(model) for model in pair(device))
    exact = pair(device)[1].double()
    exact.load_state_dict(theirs.state_dict())
    x = images(device, dtype)
    logits = [model(batch) for model, batch in ((ours, x), (theirs, x), (exact, x.double()))]
    for output in logits:
        output.square().sum().backward()
    assert logits[0].dtype == dtype
    errors = [(output.double() - logits[2]).abs().max() for output in logits[:2]]
    # Fewer roundings, but others: twice torchvision's error and one rounding of each of ten layers, of values up to 4
    assert errors[0] <= 2 * errors[1] + 40 * torch.finfo(dtype).eps
    for (name, found), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert found.dtype == expected.dtype, name
        assert name.endswith("num_batches_tracked") == (not found.is_floating_point())
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert found.grad.dtype == expected.grad.dtype == dtype, name


@pytest.mark.parametrize(
    ("dtype", "training", "parameters"),
    ((torch.float16, True, "fp32"), (torch.bfloat16, True, "of the data"), (torch.bfloat16, False, "fp32")),
    ids=str,
)
def test_module(dtype, training, parameters, either_backend, device):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(4, 8, 5, 3, generator=generator).to(device, dtype) for _ in range(2))
    vector_dtype = torch.float32 if parameters == "fp32" else dtype
    theirs = nn.BatchNorm2d(8).to(device, vector_dtype).train(training)
    for tensor in (theirs.weight, theirs.bias, theirs.running_mean):
        nn.init.normal_(tensor, generator=generator)
    ours, exact = FusedBatchNorm2d(8).to(device, vector_dtype).train(training), nn.BatchNorm2d(8).double().to(device)
    for module in (ours, exact.train(training)):
        module.load_state_dict(theirs.state_dict())
    outcomes = []
    for module, data_dtype in ((ours, dtype), (theirs, dtype), (exact, torch.float64)):
        leaf = x.to(data_dtype, copy=True).requires_grad_()
        y = module(leaf)
        y.backward(dy.to(data_dtype))
        found = {"y": y.detach(), "dx": leaf.grad, "dweight": module.weight.grad, "dbias": module.bias.grad}
        outcomes.append(found | {name: b for name, b in module.named_buffers() if b.is_floating_point()})
    assert outcomes[0]["y"].dtype == outcomes[0]["dx"].dtype == dtype
    assert outcomes[0]["dweight"].dtype == outcomes[0]["running_mean"].dtype == vector_dtype
    sums = {"dweight": (dy.double() * outcomes[2]["y"]).abs().sum((0, 2, 3)), "dbias": dy.double().abs().sum((0, 2, 3))}
    for name, exactly in outcomes[2].items():
        assert_within_budget(name, outcomes[0][name], outcomes[1][name], exactly, sums.get(name))


def test_autocast_trains_as_torchvision_under_autocast(on_aten, device):
    types = []
    for model in pair(device):
        seen = {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, args, out, n=name, s=seen: s.update({n: out.dtype}))
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(images(device)).float().square().sum()
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        types.append(seen)
    assert types[0] == types[1] and types[0]["layer1.0.bn1"] == torch.bfloat16

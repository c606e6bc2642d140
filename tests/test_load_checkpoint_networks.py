"""Whole networks of torchvision, timm and this project compute the same after loading."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torchvision import models as torchvision_models

import resnet_fast
from resnet_fast.ops import backend


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """No interpreted kernels."""
    monkeypatch.setattr(backend, "_INTERPRETED", False)


def thin_timm() -> nn.Module:
    """Bottlenecks, in timm's own layers."""
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, channels=(8, 16, 24, 32))


def with_other_statistics(model: nn.Module) -> nn.Module:
    """Fresh running statistics, 0 and 1, would hide that they were not loaded."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize(
    ("build", "wrapped"),
    [(lambda: torchvision_models.resnet18(), True), (lambda: timm.create_model("resnet18"), False)],
    ids=("torchvision, as its training saves it", "timm"),
)
def test_outputs_are_equal(build, wrapped: bool, tmp_path: Path):
    source, model = with_other_statistics(build()), resnet_fast.resnet18().eval()
    state = source.state_dict()
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in state.items()}} if wrapped else state, tmp_path / "x"
    )
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(model(x), source(x), rtol=1e-2, atol=1e-2)
    done = resnet_fast.load_checkpoint(model, tmp_path / "x")
    torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-4)  # twenty layers of fp32 roundings
    assert (done.n_tensors, done.kept, done.not_finite) == (122, (), ())


def test_a_checkpoint_of_timms_own_saver(tmp_path: Path):
    """With its settings, a moving average and an optimizer; of the two the average is taken, as timm takes it."""
    from argparse import Namespace

    from timm.utils import CheckpointSaver, ModelEmaV3

    source = thin_timm()
    optimizer, average = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9), ModelEmaV3(source)
    source(torch.randn(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    args = Namespace(model="resnet50")
    saver = CheckpointSaver(source, optimizer, args=args, model_ema=average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=50.0)
    model = thin_timm()
    done = resnet_fast.load_checkpoint(model, tmp_path / "last.pth.tar")
    assert done.entry == "state_dict_ema" and {"state_dict", "optimizer", "args"} <= set(done.ignored)
    for name, value in average.module.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    resnet_fast.load_checkpoint(model, tmp_path / "last.pth.tar", entry="state_dict")
    assert torch.equal(model.fc.weight, source.fc.weight)

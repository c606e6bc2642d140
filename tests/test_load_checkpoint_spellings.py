"""Networks with other names that compute the same are loaded by renaming, in both directions."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from foreign_nets import trained
from thin_resnet import images, thin_resnet
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

import resnet_fast
from resnet_fast.checkpoints.names import match
from resnet_fast.models import resnet


def branch(block: Any, residual: str) -> nn.Module:
    """A block as Sequentials, over the layers of torchvision's."""
    made: Any = nn.Module()
    layers = [block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2]
    if hasattr(block, "conv3"):
        layers += [nn.ReLU(), block.conv3, block.bn3]
    setattr(made, residual, nn.Sequential(*layers))
    made.shortcut = block.downsample if block.downsample is not None else nn.Sequential()
    made.forward = lambda x: (getattr(made, residual)(x) + made.shortcut(x)).relu()  # type: ignore[method-assign]
    return made


class Sequentials(nn.Module):
    """weiaicunzai/pytorch-cifar100 at 11d8418: models/resnet.py; with `left`, the ResNet-18 of tutorials."""

    def __init__(self, source: Any, residual: str, stages: tuple[str, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(source.conv1, source.bn1, nn.ReLU())
        self.pool, self.stages = source.maxpool, stages
        for number, stage in enumerate(stages, start=1):
            blocks = getattr(source, f"layer{number}")
            setattr(self, stage, nn.Sequential(*(branch(block, residual) for block in blocks)))
        self.fc = source.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(x.mean((2, 3)))


def as_in_transformers(name: str) -> str:
    """transformers, models/resnet/modeling_resnet.py: ResNetForImageClassification."""
    name = re.sub(r"^conv1", "resnet.embedder.embedder.convolution", name)
    name = re.sub(r"^bn1", "resnet.embedder.embedder.normalization", name)
    name = re.sub(r"^layer(\d)", lambda found: f"resnet.encoder.stages.{int(found[1]) - 1}.layers", name)
    name = re.sub(r"\.conv(\d)", lambda found: f".layer.{int(found[1]) - 1}.convolution", name)
    name = re.sub(r"\.bn(\d)", lambda found: f".layer.{int(found[1]) - 1}.normalization", name)
    name = name.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")
    return re.sub(r"^fc", "classifier.1", name)


NETWORKS = {
    "weiaicunzai": ("residual_function", ("conv2_x", "conv3_x", "conv4_x", "conv5_x")),
    "left": ("left", ("layer1", "layer2", "layer3", "layer4")),
}


@pytest.mark.parametrize(("name", "prefix"), [("weiaicunzai", ""), ("left", "model._orig_mod.")])
def test_blocks_as_sequentials(name: str, prefix: str, tmp_path: Path):
    source = Sequentials(trained(thin_resnet(torchvision_resnet)), *NETWORKS[name]).eval()
    torch.save({f"{prefix}{key}": value for key, value in source.state_dict().items()}, tmp_path / "theirs.pth")
    model = thin_resnet(resnet).eval()
    done = resnet_fast.load_checkpoint(model, tmp_path / "theirs.pth")
    torch.testing.assert_close(model(images("cpu")), source(images("cpu")))
    assert {("conv1.1", "bn1"), ("shortcut", "downsample")} <= set(done.translated)
    residual = NETWORKS[name][0]
    assert {(f"{residual}.0", "conv1"), (f"{residual}.4", "bn2")} <= set(done.translated)

    torch.save({f"{prefix}{key}": value for key, value in model.state_dict().items()}, tmp_path / "ours.pth")
    fresh = Sequentials(thin_resnet(torchvision_resnet), *NETWORKS[name]).eval()
    back = resnet_fast.load_checkpoint(fresh, tmp_path / "ours.pth")
    torch.testing.assert_close(fresh(images("cpu")), source(images("cpu")))
    assert ("downsample", "shortcut") in back.translated and "conv1 read as conv1.0" in str(back)


@pytest.mark.parametrize("depth", [18, 50])
def test_every_name_of_every_depth(depth: int):
    with torch.device("meta"):
        source = getattr(torchvision_resnet, f"resnet{depth}")()
        ours = list(source.state_dict())
        theirs = list(Sequentials(source, *NETWORKS["weiaicunzai"]).state_dict())
    for names in (theirs, [as_in_transformers(name) for name in ours]):
        for found in (match(ours, names), match([f"module.{name}" for name in names], ours)):
            assert found.fits and len(found.pairs) == len(ours)
        assert list(match(ours, names).pairs.values()) == names


def test_a_deep_stem_is_no_plain_one_in_a_sequential(tmp_path: Path):
    with torch.device("meta"):
        deep, plain = timm.create_model("resnet18d").state_dict(), resnet_fast.resnet18().state_dict()
    found = match(plain, deep)
    assert "conv1.weight" in found.missing and "conv1.0.weight" in found.unexpected
    assert not any(name.startswith("conv1.") for name in found.pairs.values())


def test_a_sequential_stem_alone_is_no_deep_stem(tmp_path: Path):
    """Of another number of classes: the one cause, under torchvision's names."""
    state = Sequentials(thin_resnet(torchvision_resnet), *NETWORKS["weiaicunzai"]).state_dict()
    state |= {"fc.weight": torch.ones(4, 16), "fc.bias": torch.ones(4)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(resnet_fast.CheckpointMismatch) as caught:
        resnet_fast.load_checkpoint(thin_resnet(resnet), tmp_path / "x.pth")
    assert len(caught.value.hints) == 1 and "the file has 4 classes, the model 3" in caught.value.hints[0]
    assert not caught.value.missing and not caught.value.unexpected


def test_two_layers_that_would_get_one_name_keep_theirs():
    names = ["conv1.0.weight", "conv1.1.weight", "bn1.weight", "layer1.0.left.0.weight", "layer1.0.conv1.weight"]
    assert match(["conv1.weight", "bn1.weight", "layer1.0.conv1.weight"], names).missing == ("conv1.weight",)

"""A ResNet of three blocks and few channels, ours and torchvision's, small enough for interpreted kernels."""

import torch
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from resnet_fast.models import resnet


def thin_resnet(source, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`source`: the module whose ResNet and BasicBlock it is made of. Same seed, same weights."""
    torch.manual_seed(0)
    with torch.device("meta"):  # every layer of this one that has weights is replaced
        model = source.ResNet(source.BasicBlock, [1, 1, 1, 1])
    model.inplanes = 8
    model.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    model.bn1 = model._norm_layer(8)
    model.layer1 = model._make_layer(source.BasicBlock, 8, 2)
    model.layer2 = model._make_layer(source.BasicBlock, 16, 1, stride=2)
    model.layer3, model.layer4 = nn.Sequential(), nn.Sequential()
    model.fc = nn.Linear(16, 3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.to(dtype, memory_format=torch.channels_last)


def pair(device, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's."""
    ours, theirs = (thin_resnet(source, dtype).to(device) for source in (resnet, torchvision_resnet))
    return ours, theirs


def images(device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device, dtype)

"""Networks as other people write them, as input for `convert` and `load_checkpoint`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast import FusedBatchNorm2d


class KuangliuBlock(nn.Module):
    """BasicBlock of kuangliu/pytorch-cifar: the functional ReLU, addition in place, an empty shortcut."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class KuangliuResNet(nn.Module):
    """ResNet of kuangliu/pytorch-cifar, thin: `linear`, `shortcut`, pooling by a function."""

    def __init__(self, widths=(8, 16), n_classes: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = nn.Sequential(KuangliuBlock(widths[0], widths[0]), KuangliuBlock(widths[0], widths[0]))
        self.layer2 = nn.Sequential(KuangliuBlock(widths[0], widths[1], 2))
        self.linear = nn.Linear(widths[1], n_classes)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer1(out)
        out = self.layer2(out)
        out = F.avg_pool2d(out, 4)
        out = out.view(out.size(0), -1)
        return self.linear(out)


class LambdaLayer(nn.Module):
    """Of akamaster/pytorch_resnet_cifar10."""

    def __init__(self, lambd):
        super().__init__()
        self.lambd = lambd

    def forward(self, x):
        return self.lambd(x)


class AkamasterBlock(KuangliuBlock):
    """BasicBlock of akamaster/pytorch_resnet_cifar10: that one with shortcuts of option A, in a module that holds a
    function.
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1):
        super().__init__(in_planes, planes, stride)
        if stride != 1 or in_planes != planes:
            self.shortcut = LambdaLayer(
                lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0)
            )


class AkamasterResNet(nn.Module):
    """ResNet of akamaster/pytorch_resnet_cifar10, thin."""

    def __init__(self, n_classes: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(AkamasterBlock(8, 8))
        self.layer2 = nn.Sequential(AkamasterBlock(8, 16, 2), AkamasterBlock(16, 16))
        self.linear = nn.Linear(16, n_classes)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer1(out)
        out = self.layer2(out)
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


class PreActivationBlock(nn.Module):
    """He et al. 2016, arXiv:1603.05027: BN+ReLU before each convolution, the addition bare."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + x


def conv_norm_relu() -> nn.Sequential:
    """What is written most."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1)
    )


class Block(nn.Module):
    """relu(bn(conv(x))), and whatever a subclass does beside it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)

    def steps(self, x):
        return F.relu(self.bn(self.conv(x)))

    def forward(self, x):
        return self.steps(x)


def thin_timm_resnet(**kwargs) -> nn.Module:
    """timm's own ResNet, of few channels."""
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 2, 1, 1), num_classes=3, channels=(8, 8, 16, 16), **kwargs)


def perturbed(model: nn.Module) -> nn.Module:
    """The model with affine parameters and statistics that differ from 1 and 0, which hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.weight is not None:
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.2, 0.2),
                    (module.running_var, 0.5, 1.5),
                ):
                    tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return model


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one forward and backward."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def fused_calls(model: nn.Module, monkeypatch) -> list[str]:
    calls, fused = [], FusedBatchNorm2d.fused

    def counted(self, x, residual=None, residual_norm=None, **kwargs):
        calls.append("add" if residual is not None else "relu" if kwargs["relu"] else "alone")
        return fused(self, x, residual, residual_norm, **kwargs)

    monkeypatch.setattr(FusedBatchNorm2d, "fused", counted)
    return calls


# Of KuangliuResNet.
FUSED = ["relu", "relu", "add", "relu", "add", "relu", "add"]

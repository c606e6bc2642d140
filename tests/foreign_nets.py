"""Networks of foreign_models.py with the shapes that `load_checkpoint` is tried on.

`thin_resnet.thin_resnet` has the layers of `KuangliuNet`, under torchvision's names.
"""

import torch
from foreign_models import KuangliuBlock, KuangliuResNet
from torch import Tensor, nn


class KuangliuNet(KuangliuResNet):
    """Of `thin_resnet`'s forward, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = nn.functional.max_pool2d(y, 3, 2, 1)  # thin_resnet's own; kuangliu's networks have none
        return self.linear(self.layer2(self.layer1(y)).mean((2, 3)))


class SixNPlusTwo(nn.Module):
    """The names of a ResNet-8 of He et al., section 4.2: akamaster's, or torchvision's as ours has them."""

    def __init__(self, projection: str | None, classifier: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        for stage, (n_in, n_out) in enumerate(((4, 4), (4, 8), (8, 16)), start=1):
            block = KuangliuBlock(n_in, n_out, 1 if n_in == n_out else 2)
            shortcut = block.shortcut
            del block.shortcut
            if projection is not None and n_in != n_out:
                setattr(block, projection, shortcut)
            setattr(self, f"layer{stage}", nn.Sequential(block))
        setattr(self, classifier, nn.Linear(16, 10))


def trained(model: nn.Module) -> nn.Module:
    """Values that no two tensors share, in buffers, too."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            else:
                value.fill_(1234)
    return model

"""ResNets on the fused batch norm, and every network by its name."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy_imports

__all__ = [
    "CifarResNet",
    "ResNet",
    "ResNetModel",
    "ResidualBlock",
    "article",
    "get_model",
    "list_models",
    "plain110",
    "plain20",
    "plain32",
    "plain44",
    "plain56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
]

if TYPE_CHECKING:
    from .article import ResidualBlock, ResNetModel, article
    from .cifar import (
        CifarResNet,
        plain20,
        plain32,
        plain44,
        plain56,
        plain110,
        resnet20,
        resnet32,
        resnet44,
        resnet56,
        resnet110,
    )
    from .registry import get_model, list_models
    from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
else:
    lazy_imports(__name__, __all__)

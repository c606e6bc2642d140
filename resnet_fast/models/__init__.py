"""ResNets on the fused batch norm, and every network by its name."""

from .article import ResidualBlock, ResNetModel, article
from .registry import get_model, list_models
from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152

__all__ = [
    "ResNet",
    "ResNetModel",
    "ResidualBlock",
    "article",
    "get_model",
    "list_models",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
]

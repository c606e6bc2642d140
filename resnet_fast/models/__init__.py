"""ResNets on the fused batch norm."""

from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152

__all__ = ["ResNet", "resnet101", "resnet152", "resnet18", "resnet34", "resnet50"]

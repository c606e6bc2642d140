"""ResNets built to train faster: batch norm, residual addition and ReLU as fused Triton kernels.

`from resnet_fast import resnet18` replaces torchvision's; `FusedBatchNorm2d` replaces nn.BatchNorm2d.
"""

from typing import TYPE_CHECKING

from ._version import __version__
from .common import torchvision_import  # noqa: F401  (first: it lets torchvision be imported)
from .common.lazy import lazy_imports

__all__ = [
    "CheckpointMismatch",
    "CifarResNet",
    "FusedBatchNorm2d",
    "FusedSyncBatchNorm2d",
    "ResNet",
    "__version__",
    "batch_norm_add_relu",
    "convert",
    "convert_sync_batchnorm",
    "fold_batch_norm",
    "graphed",
    "load_checkpoint",
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
    "restore",
]

if TYPE_CHECKING:
    from .checkpoints import CheckpointMismatch, load_checkpoint
    from .conversion import convert, fold_batch_norm, restore
    from .functional import batch_norm_add_relu
    from .models import (
        CifarResNet,
        ResNet,
        plain20,
        plain32,
        plain44,
        plain56,
        plain110,
        resnet18,
        resnet20,
        resnet32,
        resnet34,
        resnet44,
        resnet50,
        resnet56,
        resnet101,
        resnet110,
        resnet152,
    )
    from .nn import FusedBatchNorm2d, FusedSyncBatchNorm2d, convert_sync_batchnorm
    from .training.graphed import graphed
else:
    lazy_imports(__name__, __all__)

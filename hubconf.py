"""The networks of resnet_fast by name, for torch.hub.

torch.hub.load("OWNER/resnet_fast", "resnet18", num_classes=10, stem="cifar")
torch.hub.load("path/to/a/checkout", "resnet20", source="local")
"""

from pathlib import Path as _Path

import resnet_fast as _package
from resnet_fast import models as _models

dependencies = ["numpy", "PIL", "torch", "torchvision"]

# torch.hub downloads GitHub's archives, in which the link resnet_fast/kernels is a text file.
if not (_Path(_package.__path__[0]) / "kernels").is_dir():
    _package.__path__.append(str(_Path(__file__).parent))

globals().update({name: getattr(_models, name) for name in _models.list_models()})

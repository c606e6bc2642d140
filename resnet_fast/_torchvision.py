"""Makes `import torchvision` work beside a torch build that its compiled extension does not fit.

PyPI's torchvision for Linux is built for CUDA. Next to a CPU build of torch its extension does not load, and the import
fails with "operator torchvision::nms does not exist": torchvision registers a fake kernel for an operator that nobody
defined. resnet_fast uses none of torchvision's compiled operators, so the two missing schemas are defined here, without
kernels, and the import is tried again. Where torchvision imports as it is, nothing is defined.

The package imports this module before anything else, so its other modules import torchvision as usual.
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

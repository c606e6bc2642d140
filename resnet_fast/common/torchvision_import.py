"""Make `import torchvision` work with a torch build that does not match its compiled extension.

PyPI's torchvision for Linux is built for CUDA. With a CPU build of torch its extension does not load, and the import
fails with "operator torchvision::nms does not exist": torchvision registers a fake kernel for an operator that nobody
defined. resnet_fast uses none of torchvision's compiled operators. If the import fails in this way, the two missing
schemas are defined here, without kernels, and the import is tried again.

The package imports this module before anything else. It does not import torchvision itself, which takes seconds.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

schemas: Any = None  # torch keeps the defined schemas as long as this object exists


class _Finder:
    """Finds torchvision as Python does, with a loader that tries a failed import again."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == "torchvision" else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _mended(spec.loader.exec_module)
        return spec


def _mended(execute: Any) -> Any:
    def exec_module(module: ModuleType) -> None:
        global schemas
        try:
            execute(module)
        except RuntimeError as error:
            if "torchvision::nms does not exist" not in str(error):
                raise
            from torch.library import Library

            schemas = Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            execute(module)

    return exec_module


sys.meta_path.insert(0, _Finder)

"""Import a package's names when they are first used, because importing torch and torchvision takes seconds.

    if TYPE_CHECKING:
        from resnet_fast.data.loader import Loader
    else:
        lazy_imports(__name__, __all__)

The imports that a type checker sees are the ones that run: the package's source is parsed when a name is first used.
"""

import ast
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any


def lazy_imports(package: str, names: Sequence[str]) -> None:
    """Import the package's `names` when they are used, by its imports under `if TYPE_CHECKING`; its modules as well."""

    @cache
    def homes() -> dict[str, str]:
        source = sys.modules[package].__loader__.get_source(package)  # type: ignore[union-attr]
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
        return {alias.name: "." * node.level + (node.module or "") for node in imports for alias in node.names}

    class LazyPackage(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name in names:
                value = getattr(import_module(homes()[name], package), name)
                setattr(self, name, value)
                return value
            try:
                return import_module(f"{package}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{package}.{name}":
                    raise
            raise AttributeError(f"module {package!r} has no attribute {name!r}")

        def __setattr__(self, name: str, value: Any) -> None:
            # Importing models/article.py would replace the function of that name with the module.
            if name not in names or not isinstance(value, ModuleType):
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *names})

    sys.modules[package].__class__ = LazyPackage

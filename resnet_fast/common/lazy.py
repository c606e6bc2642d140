"""Packages whose names are imported when they are first used, because importing torch and torchvision takes seconds.

    if TYPE_CHECKING:
        from resnet_fast.data.loader import Loader
    else:
        lazy_imports(__name__, __all__)

What a type checker reads there is what is imported: the package's source is parsed once a name is asked for.
"""

import ast
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any


def lazy_imports(package: str, names: Sequence[str]) -> None:
    """Let a package have `names` by the imports under its `if TYPE_CHECKING`, and its modules, once they are used."""

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
            # Importing models/article.py would put the module in the place of the function of that name.
            if name not in names or not isinstance(value, ModuleType):
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *names})

    sys.modules[package].__class__ = LazyPackage

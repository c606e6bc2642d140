"""The extra `train`, which the command line needs."""

import sys
from typing import NoReturn


def stop_without(error: ModuleNotFoundError) -> NoReturn:
    """End the process with what to install; raise the error again if it is of no package of the extra."""
    if (error.name or "").partition(".")[0] not in ("matplotlib", "rich", "typer"):
        raise error
    sys.exit(f"resnet-fast: error: {error.name} is not installed; pip install 'resnet-fast[train]'")

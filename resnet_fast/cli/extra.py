"""The extra `train`, which the command line needs."""

import sys
from typing import NoReturn


def stop_without(error: ModuleNotFoundError) -> NoReturn:
    """End the process with the command that installs the missing package; raise any other error again."""
    packages = ("matplotlib", "rich", "typer")
    if (error.name or "").partition(".")[0] not in packages:
        raise error
    install = f"pip install {' '.join(packages)} (or the extra 'train')"
    sys.exit(f"resnet-fast: error: {error.name} is not installed: {install}")

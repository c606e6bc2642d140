"""The check for the extra `train`, which the command line needs."""

import sys
from typing import NoReturn


def stop_without(error: ModuleNotFoundError) -> NoReturn:
    """Exit with the command that installs the extra; re-raise the error if another package is missing."""
    packages = ("matplotlib", "rich", "typer")
    if (error.name or "").partition(".")[0] not in packages:
        raise error
    install = f"pip install {' '.join(packages)} (or the extra 'train')"
    sys.exit(f"resnet-fast: error: {error.name} is not installed: {install}")

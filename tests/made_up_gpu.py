"""A made-up GPU, with a table of choices in a folder of the test."""

from functools import cache
from pathlib import Path

import pytest
import torch

from resnet_fast.ops import choices
from resnet_fast.ops.implementations import CONV3X3, Choice, Problem, tiles_of

GPU = torch.device("cuda:0")
ENVIRONMENT = {
    "gpu": "NVIDIA Made-Up 80GB",
    "torch": "2.13.0+cu130",
    "triton": "3.7.1",
    "cudnn": 91002,
    "resnet_fast": "0.1.0",
    "kernels": "0123456789abcdef",
}


def conv3x3(problem: Problem) -> Choice:
    """The first of the block sizes that there are."""
    return Choice(CONV3X3, tiles_of(problem)[0])


def entries(n_images: int = 128) -> dict[Problem, Choice]:
    """One of every operation: convolutions by conv3x3, batch norms as by default."""
    convolutions = (
        Problem("convolution", "bf16", n_images, 64, 128, 32),
        Problem("data gradient", "fp16", n_images, 64, 64, 16, "bn", True),
    )
    return {
        **{problem: conv3x3(problem) for problem in convolutions},
        Problem("batch norm", "bf16", n_images, 64, 64, 4, "add"): Choice("two passes"),
        Problem("batch norm backward", "bf16", n_images, 64, 64, 4, "add", True): Choice("two passes"),
    }


def make_up_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have it be in the machine; returns where its table belongs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.delenv(choices.SWITCH, raising=False)
    monkeypatch.setattr(choices, "environment_of", lambda device: ENVIRONMENT)
    monkeypatch.setattr(choices, "_load", cache(choices._load.__wrapped__))
    path, _, _ = choices.find_table(ENVIRONMENT)
    assert path is not None
    path.parent.mkdir(parents=True)
    return path

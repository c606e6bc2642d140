"""A GPU that is not there, with a table of choices in a folder of the test's own."""

from pathlib import Path

import pytest
import torch

from resnet_fast.ops import choice_files, choices
from resnet_fast.ops.choice_format import Entries, Environment, Measured
from resnet_fast.ops.implementations import CONV3X3, Choice, Problem, tiles_of

GPU = torch.device("cuda:0")
ENVIRONMENT = Environment("NVIDIA Made-Up 80GB", "2.13.0+cu130", "3.7.1", 91002, "0.1.0", "0123456789abcdef")


def conv3x3(problem: Problem) -> Choice:
    """The first of the block sizes that there are."""
    return Choice(CONV3X3, tiles_of(problem)[0])


def entries(n_images: int = 128) -> Entries:
    """One of every operation: convolutions by conv3x3, batch norms as by default."""
    convolutions = (
        Problem("convolution", "bf16", n_images, 64, 128, 32),
        Problem("data gradient", "fp16", n_images, 64, 64, 16, "bn", True),
        Problem("weight gradient", "bf16", n_images, 64, 64, 8),
    )
    of_norm = Measured(Choice("two passes"), {Choice("two passes"): 0.5, Choice("single read"): 0.75})
    return {
        **{
            problem: Measured(conv3x3(problem), {Choice("cudnn"): 2.0, conv3x3(problem): 1.0})
            for problem in convolutions
        },
        Problem("batch norm", "bf16", n_images, 64, 64, 4, "add"): of_norm,
        Problem("batch norm backward", "bf16", n_images, 64, 64, 4, "add", True): of_norm,
    }


def make_up_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have it be in the machine; returns where its table belongs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.delenv(choice_files.SWITCH, raising=False)
    monkeypatch.setattr(choice_files, "TUNED", folder / "tuned")
    monkeypatch.setattr(choice_files, "environment_of", lambda device: ENVIRONMENT)
    monkeypatch.setattr(choices, "_tables", {})
    path = choice_files.own_path(ENVIRONMENT)
    assert path is not None
    path.parent.mkdir(parents=True)
    return path

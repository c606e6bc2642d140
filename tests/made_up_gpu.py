"""A GPU that is not there, with a table of choices in a folder of the test's own."""

from pathlib import Path

import pytest
import torch

from resnet_fast.kernels.conv_tiles import ConvTiles
from resnet_fast.ops import choice_files, choices
from resnet_fast.ops.choice_format import Entries, Environment, Measured
from resnet_fast.ops.choices import Choice, Problem

GPU = torch.device("cuda:0")
ENVIRONMENT = Environment("NVIDIA Made-Up 80GB", "2.13.0+cu130", "3.7.1", 91002, "0.1.0", "0123456789abcdef")
TILES = ConvTiles(128, 64, 32, 4, True, 4, 3)
FUSED = Choice("fused", TILES)


def entries(n_images: int = 128) -> Entries:
    """One of every operation: convolutions fused, batch norms as by default."""
    of_conv = Measured(FUSED, {Choice("cudnn"): 2.0, FUSED: 1.0})
    of_norm = Measured(Choice("two passes"), {Choice("two passes"): 0.5, Choice("single read"): 0.75})
    return {
        Problem("convolution", "bf16", n_images, 64, 128, 32): of_conv,
        Problem("data gradient", "fp16", n_images, 64, 64, 16, "bn", True): of_conv,
        Problem("weight gradient", "bf16", n_images, 64, 64, 8): of_conv,
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

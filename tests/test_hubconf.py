"""torch.hub finds every network by its name, in a checkout and in an archive like GitHub's."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fast.models import list_models

ROOT = Path(__file__).parents[1]
KERNELS = """
import sys, torch
model = torch.hub.load(sys.argv[1], "resnet20", source="local", num_classes=3)
import resnet_fast
from resnet_fast.kernels import tiles
print(resnet_fast.__file__, tiles.__file__, sep="\\n")
"""


def test_all_networks_are_listed_and_nothing_else():
    """By the rule of torch.hub.list, which asks GitHub."""
    names = runpy.run_path(str(ROOT / "hubconf.py"))
    assert {name for name, value in names.items() if callable(value) and name[0] != "_"} == set(list_models())
    assert all(names[name].__doc__ for name in list_models())  # which torch.hub.help shows


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "plain20", "article"])  # of every family
def test_a_network_is_loaded_by_its_name(name: str):
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), name, source="local", num_classes=3)
    assert list(model.parameters())[-1].shape == (3,)


def test_arguments_reach_the_network():
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), "resnet18", source="local", num_classes=10, stem="cifar")
    assert model.conv1.kernel_size == (3, 3)


def test_kernels_are_found_where_an_archive_was_unpacked_without_links(tmp_path: Path):
    pytest.importorskip("triton")
    for name in ("resnet_fast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "hubconf.py", tmp_path)
    (tmp_path / "resnet_fast/kernels").unlink()
    (tmp_path / "resnet_fast/kernels").write_text("../kernels")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", KERNELS, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "resnet_fast/__init__.py"), str(tmp_path / "kernels/tiles.py")]

"""NVIDIA's compute-sanitizer finds nothing to report in the compiled kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("memory_cases.py")
FOUND = 9  # the exit status that compute-sanitizer is told to give

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH"),
]


def sanitize(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    # Without torch's cache every tensor is an allocation of its own, with bounds that the tool knows.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    checker = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(FOUND)]
    command = [*checker, sys.executable, str(SCRIPT), "cuda", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("tool", ("memcheck", "initcheck"))
def test_small_cases(tool):
    done = sanitize(tool)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_write_outside_is_found():
    done = sanitize("memcheck", "--wrong")
    assert done.returncode == FOUND and "shifted_copy_kernel" in done.stdout, done.stdout + done.stderr

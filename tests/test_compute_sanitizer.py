"""NVIDIA's compute-sanitizer finds nothing to report in the compiled kernels."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("memory_cases.py")
FOUND = 9  # the exit status that compute-sanitizer is told to give
NOTHING_WRONG = "import torch; assert torch.ones(2, device='cuda').sum() == 2"
SECONDS = 120  # in which a tool that works has run that

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH"),
]


def sanitize(tool: str, *arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess:
    # Without torch's cache every tensor is an allocation of its own, with bounds that the tool knows.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    checker = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(FOUND)]
    command = [*checker, sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


@functools.cache
def why_not(tool: str) -> str | None:
    """Why the tool does not work here, such as for want of a right to debug, or None."""
    try:
        done = sanitize(tool, "-c", NOTHING_WRONG, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = (done.stdout + done.stderr).strip().splitlines() or ["it says nothing"]
    return None if done.returncode == 0 else f"exit status {done.returncode}: {lines[-1][:200]}"


@pytest.fixture
def working(request: pytest.FixtureRequest) -> str:
    tool = getattr(request, "param", "memcheck")
    if (reason := why_not(tool)) is not None:
        pytest.skip(f"compute-sanitizer --tool {tool} does not work on a program without faults: {reason}")
    return tool


@pytest.mark.parametrize("working", ("memcheck", "initcheck"), indirect=True)
def test_small_cases(working):
    done = sanitize(working, str(SCRIPT), "cuda")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_write_outside_is_found(working):
    done = sanitize(working, str(SCRIPT), "cuda", "--wrong")
    assert done.returncode == FOUND and "shifted_copy_kernel" in done.stdout, done.stdout + done.stderr

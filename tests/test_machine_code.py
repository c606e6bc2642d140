"""machine_code.py detects stack, narrow accesses, loops and matrix instructions in kernels that have them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("example_kernels.py")
TARGETS = ("sm_75", "sm_90", "gfx1100")


@pytest.fixture(scope="module")
def examples() -> dict[str, dict]:
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_widths(examples, target):
    narrow, wide = examples[f"narrow copy, {target}"], examples[f"wide copy, {target}"]
    assert set(narrow["loads"]) == set(narrow["stores"]) == {"16"}
    assert set(wide["loads"]) == set(wide["stores"]) == {"128"}


@pytest.mark.parametrize("target", TARGETS)
def test_loops(examples, target):
    assert 0 < examples[f"wide copy, {target}"]["loop"] < examples[f"wide copy, {target}"]["instructions"]
    assert examples[f"matrix product, {target}"]["loop"] == 0


@pytest.mark.parametrize("target", TARGETS)
def test_stack(examples, target):
    assert examples[f"too large a tile, {target}"]["stack"] > 0
    assert examples[f"too large a tile, {target}"]["registers"] >= 255
    assert examples[f"wide copy, {target}"]["stack"] == 0


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_instructions(examples, target):
    # Triton multiplies fp16 matrices on sm_75 without its matrix instructions.
    assert (examples[f"matrix product, {target}"]["matrix"] > 0) == (target != "sm_75")
    assert examples[f"wide copy, {target}"]["matrix"] == 0

"""The kernels of ResNet-18's training step in bf16, compiled for sm_80 and sm_90 on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
DATA_KERNELS = {"statistics_kernel", "normalize_kernel", "reduce_kernel", "input_gradients_kernel"}
COMBINE_KERNELS = {"combine_statistics_kernel", "combine_gradients_kernel"}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """One row per kernel specialization and architecture; a process of its own, where nothing is interpreted."""
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_both_architectures(rows):
    for arch in (80, 90):
        assert {row["kernel"] for row in rows if row["arch"] == arch} == DATA_KERNELS | COMBINE_KERNELS


def test_no_stack_on_sm_90(rows):
    assert [row for row in rows if row["arch"] == 90 and row["stack"] > 0] == []


def test_registers_leave_four_programs_to_a_multiprocessor(rows):
    """65,536 registers / (4 programs of 128 threads) = 128 a thread; fewer programs hide too little latency."""
    assert [row for row in rows if row["registers"] > 128] == []


def test_accesses_to_images_are_16_bytes_wide(rows):
    """x, y, dy, dx and their kin: 2,048 elements by 128 threads by 2 bytes are two 16-byte accesses per tensor."""
    for row in rows:
        if row["arch"] == 90 and row["kernel"] in DATA_KERNELS:
            assert row["narrow"] == 0, row
            assert sum(".128" in load for load in row["loads"]) >= 2 * row["images_read"] > 0, row
            assert sum(".128" in store for store in row["stores"]) >= 2 * row["images_written"], row
    written = {row["kernel"]: row["images_written"] for row in rows}
    assert written["normalize_kernel"] > 0 and written["input_gradients_kernel"] > 0
    assert any(row["kernel"] == "reduce_kernel" and row["images_written"] for row in rows), "dz behind a fork"


def test_image_offsets_are_64_bits_wide(rows):
    """A batch of more than 2^31 elements must not wrap around."""
    for row in rows:
        if row["kernel"] in DATA_KERNELS:
            assert row["offsets"] == ["i64"], row

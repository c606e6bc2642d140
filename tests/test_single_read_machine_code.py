"""The single-read kernels keep their tiles in registers: no stack, and images move 16 bytes at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_fast.kernels import tiles

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("compile_single_read.py")


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """A process of its own, where nothing is interpreted."""
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tiles_stay_in_registers(compiled):
    """All of them on sm_90, for which the largest tiles were chosen; elsewhere up to 32 of the 255 registers do not."""
    assert [row["case"] for row in compiled if row["stack"] > (0 if row["case"][3] == "sm_90" else 4 * 32)] == []
    assert max(row["registers"] for row in compiled) <= tiles.SINGLE_READ_REGISTERS


def test_the_largest_tiles_are_among_them(compiled):
    assert {row["n_tiles"] for row in compiled} >= {
        *tiles.SINGLE_READ_FORWARD_TILES.values(),
        *tiles.SINGLE_READ_BACKWARD_TILES.values(),
    }


def test_one_program_is_resident_on_each_multiprocessor(compiled):
    """65,536 registers and 2,048 threads, and never more shared memory than the 48 KB that need no asking."""
    threads = 32 * tiles.SINGLE_READ_WARPS
    assert threads * (tiles.SINGLE_READ_REGISTERS + 1) == 65_536 and threads <= 2048
    assert max(row["shared"] for row in compiled) < 48 << 10
    assert all(row["cooperative"] for row in compiled)


def test_images_move_16_bytes_at_a_time(compiled):
    for row in compiled:
        direction, join, _, _, _, relu, fork, _ = row["case"]
        reads = 1 + (join != "none") if direction == "forward" else 2 + fork + (join == "bn")
        writes = 1 if direction == "forward" else 1 + (join == "bn" or (join == "add" and (relu or fork)))
        assert row["loads"]["128"] >= reads * row["n_tiles"], row
        assert row["stores"]["128"] == writes * row["n_tiles"], row
        # What is narrower are bits, one byte a thread and tile, and vectors, partial results, the barrier, pivot rows.
        assert row["loads"].get("8", 0) == (
            row["n_tiles"] if direction == "backward" and relu and join != "none" else 0
        )
        assert "16" not in row["loads"], row

"""The 3x3 convolutions compile to TMA copies and matrix instructions without a stack; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_fast.kernels.conv_tiles import ConvTiles, shared_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """A process of its own, where nothing is interpreted."""
    script = Path(__file__).with_name("compile_conv3x3.py")
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def convolutions(rows: list[dict], target: str) -> list[dict]:
    found = [row for row in rows if row["target"] == target and "reversed" not in row["kernel"]]
    assert {row["kernel"] for row in found} == {
        "convolution",
        "data gradient, BN+ReLU",
        "data gradient, BN+ReLU, forked",
        "data gradient, BN+add+ReLU, forked",
        "data gradient, BN+BN+add+ReLU, forked",
    }
    return found


def test_no_stack_where_there_are_descriptors(rows):
    """For sm_80 descriptors become addresses, which take registers: with triton 3.6 too many of them."""
    assert [row for row in rows if row["stack"] and row["target"] != "sm_80"] == []


def test_hopper_multiplies_by_warpgroups(rows):
    """By warps where there are fewer output channels than the 64 rows of a warpgroup's instruction."""
    for row in convolutions(rows, "sm_90"):
        assert (row["wgmma"] > 0) == (row["tiles"]["block_n"] >= 64) and row["matrix"] > 0, row


def test_hopper_loads_its_operands_by_tma(rows):
    """Ordinary loads are the data gradient's alone, of what the batch norm needs."""
    for row in convolutions(rows, "sm_90"):
        assert row["tma_loads"] > 0, row
        if not row["kernel"].startswith("data gradient"):
            assert row["loads"] == 0, row


def test_older_and_newer_gpus_have_matrix_instructions_too(rows):
    assert all(row["matrix"] > 0 for row in convolutions(rows, "sm_80"))
    assert all(row["tcgen05"] > 0 and row["tma_loads"] > 0 for row in convolutions(rows, "sm_100"))


def test_the_need_of_shared_memory_is_known_before_anything_is_compiled(rows):
    """On GPUs with TMA, where conv3x3 is a candidate; of blocks of 16 channels Triton needs less."""
    for row in convolutions(rows, "sm_90") + convolutions(rows, "sm_100"):
        most = shared_bytes(ConvTiles(**row["tiles"]), 2)
        assert row["shared"] <= most, row
        assert row["tiles"]["block_n"] < 64 or most - row["shared"] < 64, row


def test_ampere_does_not_pipeline_them(rows):
    """So that they are no candidates there (conv3x3.is_pipelined)."""
    assert [row for row in convolutions(rows, "sm_80") if row["async_copies"] or row["tma_loads"]] == []


def test_both_operands_come_from_shared_memory(rows):
    """What takes the way through registers waits for them in every step."""
    assert [row for row in convolutions(rows, "sm_90") if row["from_registers"]] == []


def test_the_second_passes_in_reverse_give_up_what_they_have_read(rows):
    found = [row for row in rows if "reversed" in row["kernel"]]
    assert len(found) == 2 and all(row["evict_first"] > 0 for row in found)

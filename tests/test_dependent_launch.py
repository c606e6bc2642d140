"""Programmatic dependent launch: no kernel touches memory before the previous one has ended; used only if supported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fast.ops import launch

KERNELS = {
    *("statistics_kernel", "combine_statistics_kernel", "normalize_kernel"),
    *("reduce_kernel", "combine_gradients_kernel", "input_gradients_kernel"),
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """A process of its own, where nothing is interpreted."""
    script = Path(__file__).with_name("compile_dependent_launch.py")
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_memory_is_touched_behind_the_wait(rows):
    """In every path: there is no branch before it."""
    with_pdl = [row for row in rows if row["PDL"]]  # as the launching code passes what the device has
    assert {row["kernel"] for row in with_pdl} == KERNELS
    for row in with_pdl:
        assert row["launch_pdl"], row
        assert row["wait"] is not None and row["start"] is not None, row
        assert row["wait"] < row["start"], row
        assert row["wait"] < min(row["access"], row["branch"]), row


@pytest.mark.slow
def test_without_it_there_is_no_trace_of_it(rows):
    without = [row for row in rows if not row["PDL"]]
    assert {row["kernel"] for row in without} == KERNELS
    for row in without:
        assert not row["launch_pdl"] and row["wait"] is None and row["start"] is None, row


@pytest.mark.parametrize(
    ("cuda", "capability", "driver", "expected"),
    (
        pytest.param("12.8", (9, 0), 12030, True, id="Hopper"),
        pytest.param("12.8", (12, 0), 13000, True, id="Blackwell"),
        pytest.param("12.8", (8, 0), 13000, False, id="Ampere"),
        pytest.param("12.8", (9, 0), 12020, False, id="a driver of CUDA 12.2"),
        pytest.param(None, (9, 4), 0, False, id="ROCm"),
    ),
)
def test_which_gpus_have_it(cuda, capability, driver, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    for cached in (launch.nvidia_capability, launch.has_pdl):
        cached.cache_clear()
    try:
        assert launch.has_pdl(torch.device("cuda", 0)) == expected
    finally:
        for cached in (launch.nvidia_capability, launch.has_pdl):
            cached.cache_clear()


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_other_devices_have_none(device):
    assert not launch.has_pdl(torch.device(device))


def test_a_launch_asks_for_it_with_the_kernels_flag():
    assert launch.compiler_options({"PDL": True}, 90)["launch_pdl"]
    for arguments, capability in (({"PDL": False}, 90), ({}, 90), ({"PDL": True}, None)):
        assert "launch_pdl" not in launch.compiler_options(arguments, capability)

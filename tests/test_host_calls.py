"""A fused operation costs the host no more Python than it did: on a fast GPU a training loop waits for it.

Times are `python -m benchmarks.host_cost`; they depend on the machine, and calls do not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The number reached, with torch's own calls, and a tenth more.
LIMITS = {"forward": 23 * 1.1, "forward and backward": 62 * 1.1}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    script = Path(__file__).with_name("host_calls.py")
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", ("torch.float32", "torch.bfloat16"))
@pytest.mark.parametrize("case", LIMITS)
def test_python_calls_of_an_operation(case, dtype, found):
    calls = found[f"{case}, {dtype}"]
    assert sum(calls.values()) - calls["launch"] <= LIMITS[case], calls


def test_a_plan_launches_everything(found):
    """Without Triton's binder: two kernels forward and two backward, where these merge their sums."""
    for case, calls in found.items():
        assert "jit.py:run" not in calls, case
    launches = {case: calls["launch"] for case, calls in found.items()}
    assert launches["forward, torch.float32"] == 2 and launches["forward and backward, torch.float32"] == 4


def test_a_network_is_not_looked_at_in_every_step(found):
    for case in ("network, training", "network, evaluation"):
        assert "blocks.py:can_fuse" not in found[case] and "blocks.py:is_observed" not in found[case], case

"""No GPU of docs/kernels.md from compute capability 7.0 would refuse a launch of a training step.

A file of its own, which another process may run beside test_stub_driver.py: compiling takes minutes.
"""

import pytest
from test_stub_driver import assert_a_step_launches


@pytest.mark.slow
@pytest.mark.parametrize("precision", ("fp32", "fp16", "bf16"))
@pytest.mark.parametrize("capability", (90, 80, 75, 70))
def test_every_precision(capability: int, precision: str):
    assert_a_step_launches(capability, precision, [128, 512])


@pytest.mark.slow
@pytest.mark.parametrize("capability", (120, 100, 89, 86))
def test_other_gpus(capability: int):
    assert_a_step_launches(capability, "bf16", [512])

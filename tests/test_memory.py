"""A training run on a CPU keeps the memory that it frees."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from resnet_fast.common.memory import keep_freed_memory

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(5_000_000) for _ in range(3)]  # 40 MB each, 9,766 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()
returned = step()
keep_freed_memory()
step()
print(returned, step())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_the_second_step_maps_no_page_anew():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert kept < 100 < returned

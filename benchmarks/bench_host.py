"""Host time of eager and fused operations: `python -m benchmarks.host_cost` in a separate process."""

import subprocess
import sys

import pytest

from benchmarks.results import ROOT


def test_host_cost(pytestconfig: pytest.Config, capfd: pytest.CaptureFixture[str]) -> None:
    rounds = pytestconfig.option.rounds or (30 if pytestconfig.option.quick else 300)
    command = (sys.executable, "-m", "benchmarks.host_cost", "--rounds", str(rounds))
    with capfd.disabled():
        print()
        subprocess.run((*command, "--results", pytestconfig.option.results), cwd=ROOT, check=True)

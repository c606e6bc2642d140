"""No driver would refuse a launch of a training step, and plans launch the same as Triton.

On the stub driver (benchmarks/stub_driver/), which checks shared memory, registers, threads, grids, pointers and tensor
maps by the GPU's limits, and executes nothing. Each in a process of its own, where nothing is interpreted.

The launches of `make gpu` are among them: of its stages step and profile (a training step), doctor, train, tests,
predictions and tune. Recording a CUDA graph needs a GPU; the kernels in one are those of a step.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("stub_step.py")
TWO_PASSES = {"statistics_kernel", "normalize_kernel", "reduce_kernel", "input_gradients_kernel"}
COMBINE = {"combine_statistics_kernel", "combine_gradients_kernel"}
SINGLE_READ = {"single_read_forward_kernel", "single_read_backward_kernel"}
CONVOLUTIONS = {"conv3x3_kernel", "conv3x3_data_gradient_kernel"}
REFUSED = {
    "grid": "a grid of 1, 65536, 1",
    "threads": "2048 threads",
    "registers": "registers of 1024 threads",
    "other threads": "512 threads, compiled for 256",
    "shared memory without the attribute": "49153 bytes of shared memory, allowed are 49152",
    "shared memory": "shared memory, Required: 360512, Hardware limit: 232448",
    "programs that wait for each other": "1000 programs cannot run at once",
    "null pointer": "parameter 0 is a null pointer",
    "machine code": "machine code is for 100, the GPU is 90",
    "address of a tensor map": "the address is null or no multiple of 16",
    "block of a tensor map": "a block is not in 1 to 256",
    "stride of a tensor map": "a stride is no multiple of 16",
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], env=env, capture_output=True, text=True)


def launched(*arguments: object) -> dict:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_a_step_launches(capability: int, precision: str, batch_sizes: list[int]) -> None:
    """A training step and an evaluation. In bf16 also on GPUs without its instructions, for whoever asks for it."""
    kernels = launched(capability, "step", precision, *batch_sizes)
    assert kernels.keys() == TWO_PASSES | COMBINE | {"augment_kernel"}
    assert kernels["normalize_kernel"] == (17 + 17) * len(batch_sizes), kernels


def test_a_training_step():
    """Those of other GPUs and precisions: test_stub_driver_targets.py."""
    assert_a_step_launches(90, "bf16", [128])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", (128, 512))
@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_what_tune_may_choose(precision: str, batch_size: int):
    kernels = launched(90, "chosen", precision, batch_size)
    assert kernels.keys() == TWO_PASSES | COMBINE | CONVOLUTIONS | SINGLE_READ


@pytest.mark.slow
def test_the_training_command():
    assert launched(90, "training", "bf16").keys() >= TWO_PASSES | {"augment_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", (90, 75))
def test_the_self_check(capability):
    assert launched(capability, "doctor").keys() == TWO_PASSES


@pytest.mark.slow
def test_the_first_predictions():
    """With registers as asked for: the compiler takes more where it may."""
    registers = launched(90, "predictions")
    assert registers["statistics_kernel, as launched"] <= 124 < registers["statistics_kernel, no limit"]
    assert registers["statistics_kernel, at most 128 registers"] <= 128 and len(registers) == 6


@pytest.mark.slow
def test_the_tests_marked_gpu_have_few_kernels():
    """A GPU compiles 2 of them a second on a core, and `make gpu` has little time. CUDA graphs come in addition."""
    command = [sys.executable, "-O", "-m", "pytest", "--assert=plain", "-p", "stub_plugin", "-m", "gpu", "-q"]
    root = SCRIPT.parents[1]
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=root, env=env, capture_output=True, text=True)
    assert "stub driver" not in done.stdout and "OutOfResources" not in done.stdout, done.stdout
    assert 100 < int(re.findall(r"kernels loaded: (\d+)", done.stdout)[0]) <= 300, done.stdout


def test_a_plan_launches_what_triton_does():
    assert launched(90, "plans").keys() == TWO_PASSES | COMBINE


def test_another_parameter_shows():
    done = run(90, "plans", "--wrong")
    assert done.returncode != 0 and "AssertionError: none, False" in done.stderr


def test_what_a_driver_refuses_is_refused():
    answers = launched(90, "refused")
    assert answers.keys() == REFUSED.keys()
    assert [name for name, reason in REFUSED.items() if reason not in answers[name]] == [], answers

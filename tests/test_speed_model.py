"""The speed model: kernels with known times, and no kernel that is slower than the committed table."""

import ast
import csv
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import triton
from typer.testing import CliRunner

from benchmarks.predict import PREDICTED, app, slower
from benchmarks.results import ROOT
from benchmarks.speed_model.gpus import GPUS
from benchmarks.speed_model.launches import dump
from benchmarks.speed_model.path import find_loops, follow, follow_pointers
from benchmarks.speed_model.simulate import Code, Instruction, Work, predict

H200 = GPUS["h200"]
IMAGE = 0x210  # the first parameter's place in the constant bank of sm_90
TILE = 16 * 32 * 4  # bytes that four warps load with 16 bytes a thread
POINTER = "LDC.64 R2, c[0x0][0x210]"


def code(*texts: str | tuple[str, int], registers: int = 32) -> Code:
    """A program of four warps; a branch comes with the position that it goes to."""
    lines = [Instruction(*line) if isinstance(line, tuple) else Instruction(line) for line in texts]
    return Code((*lines, Instruction("EXIT")), registers, shared=0, warps=4)


def work(grid: int, loads: int) -> Work:
    return Work(grid, frozenset({IMAGE}), float(grid * loads * TILE), {IMAGE: float(loads * TILE)})


def load(register: int) -> str:
    return f"LDG.E.128 R{register}, desc[UR4][R2.64]"


def use(register: int) -> str:
    return f"FADD R40, R40, R{register}"


def test_many_independent_loads_take_the_time_of_their_bytes():
    loads = code(POINTER, *(load(register) for register in range(4, 36, 4)))
    predicted = predict(loads, work(132 * 64, loads=8), H200, in_l2=False)
    assert predicted.us == pytest.approx(132 * 64 * 8 * TILE / H200.memory_gb_s / 1000, rel=0.1)
    assert predicted.bound == "bytes" and predicted.roof > 0.9


def test_one_load_in_flight_takes_its_latency_each_time():
    """Little's law: one program on each multiprocessor, with one load of every thread in flight."""
    n, transfer_ns = 32, 132 * TILE / H200.memory_gb_s
    chain = code(POINTER, *([load(4), use(4)] * n))
    predicted = predict(chain, work(132, loads=n), H200, in_l2=False)
    assert predicted.us == pytest.approx(n * (H200.memory_ns + transfer_ns) / 1000, rel=0.05)
    assert predicted.bound == "latency" and predicted.serial_steps == n and predicted.bytes_in_flight == TILE


def test_a_kernel_that_waits_for_each_load_is_slower():
    """Of the same bytes; and so is one whose registers leave room for few programs."""
    loads = [load(register) for register in range(4, 36, 4)]
    uses = [use(register) for register in range(4, 36, 4)]
    waiting = [line for pair in zip(loads, uses, strict=True) for line in pair]
    launch = work(132 * 16, loads=8)
    good, late, large = (
        predict(code(POINTER, *lines, registers=registers), launch, H200, in_l2=False)
        for lines, registers in ((loads + uses, 64), (waiting, 64), (waiting, 255))
    )
    assert good.us < 0.9 * late.us and late.us < 0.9 * large.us


def test_more_resident_programs_hide_the_latency():
    chain = code(POINTER, *([load(4), use(4)] * 32))
    alone, together = (predict(chain, work(132 * n, loads=32), H200, in_l2=False) for n in (1, 8))
    assert together.us < 1.2 * alone.us


def test_what_issues_takes_a_cycle_for_each_instruction():
    n_instructions, programs = 4000, 16
    alternating = ["FADD R1, R2, R3", "IADD3 R4, R5, R6, R7", "IMAD R8, R9, R10, R11", "NOP"]
    busy = code(*(alternating * (n_instructions // 4)))
    predicted = predict(busy, Work(132 * programs, frozenset(), 0.0, {}), H200, in_l2=True)
    # 16 programs have 16 warps on each of the four schedulers.
    assert predicted.us == pytest.approx(n_instructions * programs / H200.clock_ghz / 1000, rel=0.1)
    assert predicted.bound == "issue"


def test_a_busy_unit_bounds():
    integers = code(*(["IADD3 R4, R5, R6, R7"] * 1000))
    predicted = predict(integers, Work(132 * 8, frozenset(), 0.0, {}), H200, in_l2=True)
    assert predicted.us == pytest.approx(2 * 1000 * 8 / H200.clock_ghz / 1000, rel=0.1) and predicted.bound == "pipe"


def test_registers_limit_the_resident_programs():
    """Of 65,536; and 64 warps are the most."""
    for registers, resident in ((32, 16), (64, 8), (96, 5), (128, 4), (255, 2)):
        assert predict(code("NOP", registers=registers), work(1, 0), H200, in_l2=True).resident == resident


def trips(program: Code, loads: int) -> list[int]:
    path = follow(program, follow_pointers(program.instructions, [IMAGE]), {IMAGE: float(loads * TILE)})
    return [path.count(at) for at, line in enumerate(program.instructions) if line.text.startswith("LDG")]


def test_a_loop_runs_until_its_loads_have_read_the_tensor():
    assert trips(code(POINTER, load(4), use(4), ("@P0 BRA 0x10", 1)), loads=7) == [7]


def test_a_loop_that_loads_ahead_runs_once_less():
    ahead = code(POINTER, load(4), "MOV R8, R4", load(4), use(8), ("@P0 BRA 0x20", 2), use(4))
    assert trips(ahead, loads=7) == [1, 6]


def test_what_unrolling_leaves_over_runs_as_often_as_is_left():
    unrolled = code(
        POINTER,
        ("@P1 BRA 0x70", 7),
        load(4),
        load(8),
        load(12),
        load(16),
        ("@P0 BRA 0x20", 2),
        ("@P2 BRA 0xa0", 10),
        load(4),
        load(8),
        ("@P3 BRA 0xc0", 12),
        load(4),
    )
    assert trips(unrolled, loads=11) == [2, 2, 2, 2, 1, 1, 1]
    assert trips(unrolled, loads=9) == [2, 2, 2, 2, 0, 0, 1]
    assert trips(unrolled, loads=2) == [0, 0, 0, 0, 1, 1, 0]


def test_a_second_pass_behind_a_reduction_reads_again():
    two_passes = code(POINTER, load(4), ("@P0 BRA 0x10", 1), "SHFL.BFLY PT, R5, R4, 0x1, 0x1f", load(8), ("@P0 BRA", 4))
    assert trips(two_passes, loads=5) == [5, 5]


def test_a_retry_around_a_loop_runs_once():
    retry = code(POINTER, "NOP", load(4), ("@P0 BRA 0x20", 2), ("@P1 BRA 0x10", 1))
    assert trips(retry, loads=5) == [5] and len(find_loops(retry.instructions)) == 2


def test_a_load_into_the_registers_of_its_own_address_is_an_access():
    predicated = code(POINTER, "@!P0 LDG.E.SYS R2, [R2]")
    assert follow_pointers(predicated.instructions, [IMAGE]) == {1: IMAGE}


def test_an_access_that_the_path_misses_is_an_error():
    with pytest.raises(ValueError, match="the kernel's path moves 0 bytes of images, it has to move"):
        predict(code("NOP"), work(132, loads=1), H200, in_l2=False)


class PlantedJob(NamedTuple):
    """Stands for `network.Job`."""

    key: str
    predicted_us: str
    n_channels: int = 64
    width: int = 32

    @property
    def name(self) -> dict[str, str]:
        return {"kernel": "reduce_kernel"}

    def predict(self) -> dict[str, str]:
        return {"predicted_us": self.predicted_us}


@pytest.mark.parametrize(
    ("job", "is_slower"),
    [
        (PlantedJob("new", "10.2"), False),
        (PlantedJob("new", "10.4"), True),
        (PlantedJob("old", "10.4"), True),
        (PlantedJob("new", "10.4", n_channels=512, width=4), False),  # not predicted again
    ],
)
def test_a_kernel_that_grows_by_more_than_3_percent_is_named(job, is_slower, tmp_path):
    (tmp_path / "gpu.csv").write_text("kernel,predicted_us,key\nreduce_kernel,10.0,old\n")
    lines = list(slower(tmp_path / "gpu.csv", [job], ("kernel",)))
    assert lines == ["gpu.csv has 10.0 us for kernel reduce_kernel: 10.4 us now"] * is_slower


def test_the_page_shows_the_steps():
    page = (PREDICTED / "README.md").read_text(encoding="utf-8")
    with open(PREDICTED / "steps.csv", newline="") as file:
        steps = [row for row in csv.DictReader(file) if (row["gpu"], row["precision"]) == ("h200", "bf16")]
    assert len(steps) == 6
    for step in steps:
        provider = {"compile": "torch.compile"}.get(step["provider"], step["provider"])
        launches_us = int(step["launches"]) * H200.launch_us
        figures = f"{step['launches']} | {int(step['batch_norm_us']):,} | {launches_us:g} | {step['step_ms']}"
        assert f"| {provider} | {figures} |" in page


@pytest.mark.parametrize(
    ("gpu", "precision"), (("h200", "bf16"), ("a100", "bf16"), ("rtx4090", "bf16"), ("t4", "fp16"))
)
def test_the_page_compares_the_gpus(gpu, precision):
    page = (PREDICTED / "README.md").read_text(encoding="utf-8")
    with open(PREDICTED / "steps.csv", newline="") as file:
        times = {
            (row["batch_size"], row["provider"]): int(row["batch_norm_us"])
            for row in csv.DictReader(file)
            if (row["gpu"], row["precision"]) == (gpu, precision)
        }
    cells = []
    for size in ("128", "512"):
        eager, compiled, fused = (times[size, provider] for provider in ("eager", "compile", "fused"))
        cells += [f"{eager:,} / {compiled:,} / {fused:,}", f"{compiled / fused:.2f}"]
    assert f"| {GPUS[gpu].name}, {precision} | {' | '.join(cells)} |" in page


def test_bf16_on_a_gpu_without_is_refused():
    result = CliRunner().invoke(app, ["--gpu", "t4", "--dtype", "bf16"])
    assert result.exit_code == 2 and "t4: GPUs before compute capability 8.0 have no bf16" in result.output


def test_no_kernel_is_slower_than_its_row():
    """If one is, for a good reason, run `python -m benchmarks.predict`. In a process where nothing is interpreted."""
    with open(PREDICTED / "h200.csv", newline="") as file:
        versions = {row["triton"] for row in csv.DictReader(file)}
    if versions != {triton.__version__}:
        pytest.skip(f"predicted with Triton {', '.join(versions)}, whose machine code is another")
    arguments = ["--gpu", "h200", "--dtype", "bf16", "--batch-size", "128", "--check"]
    env = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.predict", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_keys_do_not_depend_on_the_version_of_python():
    """The committed keys hold what ast.dump of Python 3.11 wrote; 3.12 added a field, 3.13 left empty lists out."""
    assert dump(ast.parse("def f(x=None):\n    return [], x.y")) == (
        "Module(body=[FunctionDef(name='f', args=arguments(posonlyargs=[], args=[arg(arg='x')], kwonlyargs=[], "
        "kw_defaults=[], defaults=[Constant(value=None)]), body=[Return(value=Tuple(elts=[List(elts=[], ctx=Load()), "
        "Attribute(value=Name(id='x', ctx=Load()), attr='y', ctx=Load())], ctx=Load()))], decorator_list=[])], "
        "type_ignores=[])"
    )

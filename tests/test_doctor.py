"""`resnet-fast doctor` says what runs here and why, and advises where something is missing."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_up_gpu import ENVIRONMENT, GPU, entries, make_up_gpu
from typer.testing import CliRunner

from resnet_fast.cli import app
from resnet_fast.doctor import Finding, exit_code
from resnet_fast.doctor import diagnosis as doctor
from resnet_fast.ops import backend, choice_files

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def run_command(before: str = "") -> subprocess.CompletedProcess:
    """The command in a process of its own, on ATen, after the code `before`."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    code = f"{before}\nfrom resnet_fast.cli import app; app(['doctor', '--device', 'cpu'])"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def joined(output: str) -> str:
    """Wrapped lines, as one."""
    return " ".join(output.split())


def test_a_real_run_on_the_cpu():
    done = run_command()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "" and "\x1b" not in done.stdout and "\r" not in done.stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    names = [line[6:20].strip() for line in lines if line[:4].strip() in ("ok", "note")]
    for name in (
        "Python",
        "torch",
        "torchvision",
        "triton",
        "matplotlib",
        "C++ compiler",
        "backend",
        "precision",
        "tuning",
    ):
        assert name in names
    assert all(line[19] == " " and line[20] != " " for line in lines[:-2] if line[:4].strip())  # aligned
    assert "aten on cpu" in done.stdout and "CPU tensors need Triton's interpreter" in joined(done.stdout)
    assert "right: 7 of 7 checks, in fp32" in joined(done.stdout)
    assert float(re.search(r"([\d.]+) s\n", done.stdout)[1]) < 10  # what the docstring promises


def test_without_triton_it_runs_and_advises():
    done = run_command("import sys; sys.modules['triton'] = None")
    assert done.returncode == 0, done.stdout + done.stderr
    text = joined(done.stdout)
    assert "note triton not installed -> pip install 'triton>=3.6'" in text
    assert "triton cannot be imported" in text and "right: 7 of 7 checks" in text and "see the notes" in text


@pytest.mark.parametrize("name", ("gpu", "cuda:99", "cpu:0"))
def test_a_wrong_device_exits_with_2(name):
    done = CliRunner().invoke(app, ["doctor", "--device", name])
    assert done.exit_code == 2 and done.stdout == "" and repr(name) in done.stderr and done.stderr.count("\n") == 1


# Made-up machines.


@pytest.fixture
def nvidia(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "550.54.15")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("nvidia")
def test_a_gpu_beside_a_cpu_build_of_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    driver, gpu = doctor.find_gpus()
    assert driver == Finding("driver", "NVIDIA 550.54.15")
    assert gpu.ok and "CPU build" in gpu.value and "pytorch.org/get-started" in gpu.advice


@pytest.mark.usefixtures("nvidia")
def test_a_gpu_that_a_cuda_build_cannot_use(monkeypatch):
    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    gpu = [*doctor.find_gpus()][-1]
    assert "too old (found version 11040)" in gpu.value and "update the driver" in gpu.advice
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' is set" in [*doctor.find_gpus()][-1].advice


@pytest.mark.parametrize(
    ("capability", "advice"), [((9, 0), ""), ((7, 5), ""), ((7, 0), "older than 7.5"), ((6, 1), "holds no code for it")]
)
@pytest.mark.usefixtures("nvidia")
def test_a_gpu_that_torch_sees(capability, advice: str, monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA Made-Up", total_memory=80 * 2**30, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_75", "sm_80", "sm_90"])
    _, first, second = doctor.find_gpus()
    assert (first.name, second.name) == ("cuda:0", "cuda:1") and first.ok
    assert first.value == f"NVIDIA Made-Up, 80.0 GiB, compute capability {capability[0]}.{capability[1]}"
    assert advice in first.advice and bool(first.advice) == bool(advice)


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 6), ["sm_80", "sm_90"], True),  # a later minor
        ((8, 0), ["sm_86", "sm_90"], False),  # an earlier one
        ((12, 0), ["sm_90", "compute_90"], True),  # compiled for it by the driver
        ((12, 0), ["sm_90a"], False),
        ((7, 5), ["sm_80", "compute_90"], False),
        ((10, 3), ["sm_100"], True),
        ((9, 0), [], True),  # nothing is known
    ],
)
def test_which_gpus_a_build_runs_on(capability, built_for, runs):
    assert doctor.has_code_for(capability, built_for) is runs


def test_the_driver_is_read_from_the_kernel_or_nvidia_smi(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(doctor, "NVIDIA_MODULE", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.nvidia_driver() is None
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 535.1\necho 535.1\n")
    smi.chmod(0o755)
    assert doctor.nvidia_driver() == "535.1"
    smi.write_text("#!/bin/sh\necho 'No devices were found'\nexit 9\n")
    assert doctor.nvidia_driver() is None
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: 12.2.0 \n"
    (tmp_path / "version").write_text(line)
    assert doctor.nvidia_driver() == "570.86.15"


def test_the_interpreter_is_to_be_unset(monkeypatch):
    monkeypatch.setattr(backend, "_INTERPRETED", True)
    (finding,) = doctor.find_backend(CPU)
    assert finding.ok and finding.value == "triton on cpu" and "TRITON_INTERPRET is set" in finding.advice
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    (finding,) = doctor.find_backend(CPU)
    assert finding.value.startswith("aten on cpu") and finding.advice == ""


def test_precision_has_its_reason(monkeypatch):
    for precision, reason in (("bf16", "computes in it"), ("fp32", "no bf16 instructions")):
        monkeypatch.setattr(doctor, "choose_precision", lambda device, precision=precision: precision)
        (finding,) = doctor.find_precision(CPU)
        assert finding.value.startswith(precision) and reason in finding.value


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch) -> Path:
    """Where the table of a GPU belongs that is not there."""
    monkeypatch.setattr(doctor, "why_not", lambda device: None)
    return make_up_gpu(tmp_path, monkeypatch)


def test_a_gpu_that_is_not_tuned(own_table: Path, monkeypatch):
    (finding,) = doctor.find_tuning(GPU)
    assert finding.ok and finding.value == "not tuned: convolutions are cuDNN's, batch norms take two passes"
    assert "run `resnet-fast tune`" in finding.advice
    monkeypatch.setenv("RESNET_FAST_TUNED", "0")
    (finding,) = doctor.find_tuning(GPU)
    assert finding.ok and finding.value.startswith("off: ") and "RESNET_FAST_TUNED=0 is set" in finding.advice


def test_a_gpu_that_is_tuned_by_oneself_by_others_and_by_both(own_table: Path):
    choice_files.add(own_table, ENVIRONMENT, entries())
    ours = f"tuned: 3 of 5 entries differ from the default, from {own_table}"
    assert [*doctor.find_tuning(GPU)] == [Finding("tuning", ours)]
    choice_files.TUNED.mkdir()
    choice_files.add(choice_files.TUNED / "nvidia-made-up-80gb.json", ENVIRONMENT, entries(7) | entries(8))
    theirs = "6 of 10 entries differ from the default, from the built-in nvidia-made-up-80gb.json"
    assert [*doctor.find_tuning(GPU)] == [Finding("tuning", f"{ours}; and {theirs}")]
    own_table.unlink()
    assert [*doctor.find_tuning(GPU)] == [Finding("tuning", f"tuned: {theirs}")]


def test_tables_that_are_there_and_do_not_count_are_named(own_table: Path):
    own_table.write_text('{"format": 1')
    older = own_table.with_name("nvidia-made-up-80gb.0123456789ab.json")
    older.write_text("")
    damaged, others = doctor.find_tuning(GPU)
    assert damaged.ok and damaged.value.startswith(f"{own_table} is not used: it is not JSON")
    assert damaged.advice == "run `resnet-fast tune` again, which replaces it"
    assert others.ok and older.name in others.value and "delete" in others.advice
    assert exit_code([damaged, others]) == 0 and doctor.format_end([damaged]) == "What is needed works; see the notes."
    own_table.unlink()
    choice_files.TUNED.mkdir()
    built_in = choice_files.TUNED / "nvidia-made-up-80gb.json"
    choice_files.add(built_in, ENVIRONMENT._replace(kernels="f" * 16), entries())
    finding = [*doctor.find_tuning(GPU)][0]
    assert finding.ok and "it was measured with kernels" in finding.value and "of your own" in finding.advice


@pytest.mark.parametrize(("version", "ok"), [("2.10.1+cu128", False), ("2.11.0a0+git1", True), ("3.0.0", True)])
def test_a_torch_that_is_too_old(version: str, ok: bool, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    (finding,) = doctor.find_package("torch", "2.11")
    assert finding.ok is ok and version in finding.value
    assert ("pytorch.org" in finding.advice) is not ok


def test_packages_that_are_missing_broken_or_old(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so: cannot open')")
    (tmp_path / "old_package.py").write_text("__version__ = '1.2.3'")
    for name, value in (
        ("missing_package", "not installed"),
        ("broken_package", "cannot be imported (OSError: libcudart.so: cannot open)"),
        ("old_package", "1.2.3; 1.10 or later is needed"),
    ):
        for needed in (True, False):
            monkeypatch.setattr(doctor, "NEEDED", {name: "1.10"} if needed else {})
            (finding,) = doctor.find_package(name, "1.10")
            assert finding == Finding(name, value, ok=not needed, advice=f"pip install '{name}>=1.10'")
            assert exit_code([finding]) == needed
    assert [*doctor.find_package("old_package", "1.2")] == [Finding("old_package", "1.2.3")]


def test_no_compiler(monkeypatch):
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (finding,) = doctor.find_compiler(CPU)
    assert finding.ok and "torch.compile needs" in finding.value and "set CXX" in finding.advice
    (finding,) = doctor.find_compiler(torch.device("cuda"))
    assert finding.ok and "no gcc or clang" in finding.value and "set CC" in finding.advice


def test_a_line_that_cannot_be_told_leaves_the_others(monkeypatch):
    def fails(*args):
        raise OSError("disk on fire")
        yield

    monkeypatch.setattr(doctor, "find_gpus", fails)
    monkeypatch.setattr(doctor, "check_parity", lambda device: [Finding("parity", "right")])
    shown = []
    findings = doctor.diagnose("cpu", shown.append)
    assert findings == shown and exit_code(findings) == 0
    assert Finding("GPU", "cannot be told: OSError: disk on fire") in findings and findings[-1].name == "parity"
    monkeypatch.setattr(doctor, "check_parity", fails)
    assert exit_code(doctor.diagnose("cpu")) == 1  # what is not checked is not right


def test_the_last_line_and_the_exit_code():
    right, note, wrong = Finding("a", "x"), Finding("b", "x", advice="do y"), Finding("c", "x", ok=False)
    assert exit_code([right, note]) == 0 and exit_code([right, wrong]) == 1
    assert doctor.format_end([right]) == "All is well."
    assert doctor.format_end([right, note]) == "What is needed works; see the notes."
    assert doctor.format_end([right, note, wrong]) == "Something is wrong: c."


def test_long_findings_fit_80_columns():
    lines = doctor.format_finding(Finding("a name", "word " * 40 + "/" + 200 * "x", advice=f"run {'y' * 100} " * 3))
    assert max(map(len, lines)) <= 80 and lines[0].startswith("note  a name        word")
    assert sum("-> " in line for line in lines) == 1


def test_the_versions_asked_for_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = doctor.NEEDED | doctor.OPTIONAL
    extras = project["optional-dependencies"]
    ours = " ".join(project["dependencies"] + extras["train"] + [r for r in extras["dev"] if r.startswith("triton")])
    assert dict(re.findall(r"([\w-]+)>=([\d.]+)", ours)) == asked

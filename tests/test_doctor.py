"""`resnet-fast doctor` says what runs on this machine and why, and gives advice if something is missing."""

import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_up_gpu import ENVIRONMENT, GPU, entries, make_up_gpu
from typer.testing import CliRunner

import resnet_fast.doctor
from resnet_fast.cli import app
from resnet_fast.common import machine
from resnet_fast.doctor import Finding, exit_code, format_end
from resnet_fast.doctor import diagnosis as doctor
from resnet_fast.ops.choices import add

CPU = torch.device("cpu")


@pytest.mark.usefixtures("on_aten")
def test_a_sound_machine_passes_within_10_seconds():
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert done.exit_code == 0 and done.stderr == "" and "\x1b" not in done.stdout and "\r" not in done.stdout
    lines = done.stdout.splitlines()
    names = {line[6:20].strip() for line in lines if re.match(r"(ok  |note)  .{13} \S", line)}
    probes = "Python", *doctor.NEEDED, *doctor.OPTIONAL, "C++ compiler", "backend", "precision", "tuning", "parity"
    assert names >= {*probes} and max(map(len, lines)) <= 80
    assert all(line[19] == " " and line[20] != " " for line in lines[:-2] if line[:4].strip())  # aligned
    parity = re.search(r"right: 7 of 7 checks, in fp32.* ([\d.]+) s$", done.stdout, re.DOTALL | re.MULTILINE)
    assert parity and float(parity[1]) < 10


@pytest.mark.usefixtures("on_aten")
def test_a_missing_package_is_named_and_a_needed_one_exits_with_1(monkeypatch):
    monkeypatch.setattr(resnet_fast, "doctor", resnet_fast.doctor)  # is imported again, and then put back
    for name in ("", ".diagnosis", ".parity"):
        monkeypatch.delitem(sys.modules, f"resnet_fast.doctor{name}")
    for name in ("triton", "torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    text = " ".join(done.stdout.split())
    assert "FAIL torchvision not installed -> pip install 'torchvision>=0.26'" in text
    assert "note triton not installed -> pip install 'triton>=3.6'; until then nothing is fused" in text
    assert done.exit_code == 1 and text.endswith("Something is wrong: torchvision.")


@pytest.mark.parametrize("name", ("gpu", "cuda:99", "cpu:0"))
def test_a_wrong_device_exits_with_2(name):
    done = CliRunner().invoke(app, ["doctor", "--device", name])
    assert done.exit_code == 2 and done.stdout == "" and repr(name) in done.stderr and done.stderr.count("\n") == 1


def test_a_line_that_cannot_be_told_leaves_the_others(monkeypatch):
    def fails(*args):
        raise OSError("disk on fire")

    monkeypatch.setattr(doctor, "nvidia_driver", fails)
    monkeypatch.setattr(doctor.parity, "self_check", fails)
    shown = []
    findings = doctor.diagnose("cpu", shown.append)
    assert findings == shown and {finding.name for finding in findings} >= {"backend", "precision", "tuning"}
    assert Finding("GPU", "cannot be told: OSError: disk on fire") in findings
    unchecked = Finding("parity", "cannot be told: OSError: disk on fire", ok=False)  # what is not checked is not right
    assert findings[-1] == unchecked


def test_the_last_line_and_the_exit_code():
    right, note, wrong = Finding("a", "x"), Finding("b", "x", advice="do y"), Finding("c", "x", ok=False)
    for findings, code, end in (
        ([right], 0, "All is well."),
        ([right, note], 0, "Everything required works; see the notes."),
        ([right, note, wrong], 1, "Something is wrong: c."),
    ):
        assert (exit_code(findings), format_end(findings)) == (code, end)


# Made-up machines.


@pytest.mark.parametrize(
    ("cuda", "visible", "value", "advice"),
    [
        (None, None, "CPU build", "pytorch.org/get-started"),
        ("12.8", None, "too old (found version 11040)", "update the driver"),
        ("12.8", "", "too old (found version 11040)", "CUDA_VISIBLE_DEVICES='' is set"),
    ],
)
def test_a_gpu_that_torch_cannot_use(cuda, visible, value: str, advice: str, monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040)")

    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "550.54.15")
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False, init=init))
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=cuda, hip=None))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    driver, gpu = doctor.find_gpus()
    assert driver == Finding("driver", "NVIDIA 550.54.15")
    assert gpu.ok and value in gpu.value and advice in gpu.advice


@pytest.mark.parametrize(
    ("major", "minor", "built_for", "advice"),
    [
        (7, 5, "sm_70 sm_75", ""),
        (7, 0, "sm_70 sm_75", "not tested below 7.5"),
        (8, 6, "sm_80 sm_90", ""),  # a later minor
        (8, 0, "sm_86 sm_90", "has no code for it"),  # an earlier one
        (12, 0, "sm_90 compute_90", ""),  # compiled for it by the driver
        (12, 0, "sm_90a", "has no code for it"),
        (7, 5, "sm_80 compute_90", "has no code for it"),
        (10, 3, "sm_100", ""),
        (9, 0, "", ""),  # nothing is known
    ],
)
def test_a_gpu_that_torch_sees(major: int, minor: int, built_for: str, advice: str, monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA Made-Up", total_memory=80 * 2**30, major=major, minor=minor)
    cuda = {"is_available": True, "device_count": 2, "get_arch_list": built_for.split()}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.version, "hip", None)
    first, second = [*doctor.find_gpus()][-2:]
    assert (first.name, second.name) == ("cuda:0", "cuda:1") and first.ok
    assert first.value == f"NVIDIA Made-Up, 80.0 GiB, compute capability {major}.{minor}"
    assert advice in first.advice and bool(first.advice) == bool(advice)


def test_the_driver_is_read_from_the_kernel_or_nvidia_smi(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(machine, "NVIDIA_MODULE", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.nvidia_driver() is None
    for script, version in (("echo 535.1; echo 535.1", "535.1"), ("echo 'No devices were found'; exit 9", None)):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert machine.nvidia_driver() == version
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: 12.2.0 \n"
    (tmp_path / "version").write_text(line)
    assert machine.nvidia_driver() == "570.86.15"


INTERPRETED, PRECISION = "resnet_fast.ops.backend._INTERPRETED", "resnet_fast.doctor.diagnosis.choose_precision"


@pytest.mark.parametrize(
    ("probe", "device", "name", "patch", "value", "advice"),
    [
        (doctor.find_backend, "cpu", INTERPRETED, True, "triton on cpu", "TRITON_INTERPRET is set"),
        (doctor.find_backend, "cpu", INTERPRETED, False, "CPU tensors need Triton's interpreter", ""),
        (
            doctor.find_precision,
            "cpu",
            PRECISION,
            lambda device: "bf16",
            "bf16 for train: this processor has instr",
            "",
        ),
        (doctor.find_precision, "cpu", PRECISION, lambda device: "fp32", "fp32 for train: this processor has no", ""),
        (doctor.find_precision, "cuda", PRECISION, lambda device: "fp16", "fp16 for train: this GPU has no bf16", ""),
        (doctor.find_compiler, "cpu", "shutil.which", lambda name: None, "which torch.compile needs", "set CXX to"),
        (doctor.find_compiler, "cuda", "shutil.which", lambda name: None, "no gcc or clang", "set CC to"),
    ],
)
def test_what_runs_has_its_reason(probe, device: str, name: str, patch, value: str, advice: str, monkeypatch):
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(name, patch)
    (finding,) = probe(torch.device(device))
    assert finding.ok and value in finding.value
    assert advice in finding.advice and bool(finding.advice) == bool(advice)


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch) -> Path:
    """Where the table of a GPU belongs that is not there."""
    monkeypatch.setattr(doctor, "why_not", lambda device: None)
    return make_up_gpu(tmp_path, monkeypatch)


def test_a_gpu_that_is_not_tuned(own_table: Path, monkeypatch):
    defaults = "convolutions are cuDNN's, batch norms take two passes"
    assert [*doctor.find_tuning(GPU)] == [Finding("tuning", f"not tuned: {defaults}", advice="run `resnet-fast tune`")]
    monkeypatch.setenv("RESNET_FAST_TUNED", "0")
    expected = Finding("tuning", f"off: {defaults}", advice="RESNET_FAST_TUNED=0 is set: unset it")
    assert [*doctor.find_tuning(GPU)] == [expected]


def test_a_gpu_that_is_tuned(own_table: Path):
    add(own_table, ENVIRONMENT, entries())
    value = f"tuned: 2 of 4 differ from the default, from {own_table}"
    assert [*doctor.find_tuning(GPU)] == [Finding("tuning", value)]


def test_a_table_that_does_not_count_is_named_with_the_reason(own_table: Path):
    add(own_table, ENVIRONMENT | {"kernels": "f" * 16}, entries())
    (finding,) = doctor.find_tuning(GPU)
    assert finding.value.startswith(f"{own_table} is not used: it must have been measured with kernels")
    assert finding.advice == "delete it or run `resnet-fast tune` again" and exit_code([finding]) == 0


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("raise OSError('libcudart.so: cannot open')", "cannot be imported (OSError: libcudart.so: cannot open)"),
        ("__version__ = '2.10.1+cu128'", "2.10.1+cu128; 2.11 or later is needed"),
        ("__version__ = '2.11.0a0+git1'", "2.11.0a0+git1"),
        ("__version__ = '3.0'", "3.0"),
    ],
)
def test_a_package_is_imported_and_its_version_compared(source: str, value: str, tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_package.py").write_text(source)
    for needed in ({}, {"a_package": "2.11"}):
        monkeypatch.setattr(doctor, "NEEDED", needed)
        expected = Finding("a_package", value, ok=not needed, advice="pip install 'a_package>=2.11'")
        if value in source:
            expected = Finding("a_package", value)
        assert [*doctor.find_package("a_package", "2.11")] == [expected]
    sys.modules.pop("a_package", None)


def test_a_torch_that_is_too_old_is_chosen_anew():
    (finding,) = doctor.find_package("torch", "99.0")
    assert not finding.ok and finding.value.endswith("99.0 or later is needed") and "pytorch.org" in finding.advice


def test_the_versions_asked_for_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    ours = " ".join(project["dependencies"] + extras["train"] + [r for r in extras["dev"] if r.startswith("triton")])
    assert dict(re.findall(r"([\w-]+)>=([\d.]+)", ours)) == doctor.NEEDED | doctor.OPTIONAL

"""Find out what is installed, what runs on this machine and why, and what to do if something is missing.

This changes nothing on the machine, except that Triton caches the kernels that it compiles.
"""

import importlib
import os
import platform
import re
import shutil
import sysconfig
import textwrap
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from ..common import torchvision_import
from ..common.machine import nvidia_driver
from ..ops import choices
from ..ops.backend import INTERPRETER, choose_backend, is_interpreted, why_not_triton
from ..training.config import choose_device, choose_precision
from ..tuning import why_not
from ..tuning.report import format_changed
from . import parity

# The versions of pyproject.toml. The library works without the optional packages.
NEEDED = {"torch": "2.11", "torchvision": "0.26", "numpy": "1.26", "pillow": "10"}
OPTIONAL = {"matplotlib": "3.8", "rich": "13", "typer": "0.12", "triton": "3.6"}
OLDEST_GPU = (7, 5)  # the kernels are compiled for sm_75 and later (docs/kernels.md)
INSTALL_TORCH = "choose the build at https://pytorch.org/get-started/locally and run the command shown there"
DEFAULTS_RUN = "convolutions are cuDNN's, batch norms take two passes"


@dataclass(frozen=True)
class Finding:
    """One line of the report: its value, whether it is all right, and advice, which may come with `ok`, too."""

    name: str
    value: str
    ok: bool = True
    advice: str = ""


def diagnose(device: str = "auto", show: Callable[[Finding], None] = lambda finding: None) -> list[Finding]:
    """Examine the machine, then check results computed on `device`; takes at most about 10 seconds.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N", as for training.
        show: called with each finding as soon as it is made.

    Raises:
        ValueError: `device` is not one of these, or does not exist.
    """
    target, findings = choose_device(device), []
    probes = {
        "Python": [Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")],
        **{name: find_package(name, at_least) for name, at_least in (NEEDED | OPTIONAL).items()},
        "GPU": find_gpus(),
        "compiler": find_compiler(target),
        "backend": find_backend(target),
        "precision": find_precision(target),
        "tuning": find_tuning(target),
        "parity": check_parity(target),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of old drivers and GPUs; the findings say so themselves
        for name, probe in probes.items():  # generators, which run here
            if name == "parity" and not all(finding.ok for finding in findings):
                probe = [Finding("parity", "not checked while a needed package is missing, broken or too old")]
            try:
                for finding in probe:
                    show(finding)
                    findings.append(finding)
            except Exception as error:  # a failing line leaves the others; an impossible check counts as failed
                findings.append(Finding(name, f"cannot be told: {parity.first_line(error)}", ok=name != "parity"))
                show(findings[-1])
    return findings


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 if a required package is missing, broken or too old, or a result is wrong; else 0."""
    return 0 if all(finding.ok for finding in findings) else 1


def torch_build() -> str:
    """Return what the installed torch was built for."""
    versions = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}
    return next((f"{name} {version} build" for name, version in versions.items() if version is not None), "CPU build")


def find_package(name: str, at_least: str) -> Iterator[Finding]:
    """Check the version of a package by importing it, since only that shows whether it is intact."""
    module_name = "PIL" if name == "pillow" else name
    advice = INSTALL_TORCH if name == "torch" else f"pip install '{name}>={at_least}'"
    try:
        module = importlib.import_module(module_name)
        version = getattr(module, "__version__", None) or metadata.version(name)
        value = f"{version}, {torch_build()}" if name == "torch" else version
        # "2.11.0a0+git" is (2, 11), enough to compare.
        have, need = ([int(n) for n in re.findall(r"\d+", v.partition("+")[0])[:2]] for v in (version, at_least))
        if have >= need:
            if name == "torchvision" and torchvision_import.schemas is not None:
                value += "; its compiled operators do not fit this torch, but are not needed"
            return (yield Finding(name, value))
        value += f"; {at_least} or later is needed"
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module_name
        value = "not installed" if missing else f"cannot be imported ({parity.first_line(error)})"
    if name == "triton" and platform.system() != "Linux":
        yield Finding(name, f"{value}; it needs Linux, so ATen runs here")
    else:
        advice += "; until then nothing is fused" if name == "triton" else ""  # ATen computes the same
        yield Finding(name, value, name not in NEEDED, advice)


def find_gpus() -> Iterator[Finding]:
    """Find NVIDIA's driver and the GPUs that torch sees, or the reason why it sees none."""
    if (driver := nvidia_driver()) is not None:
        yield Finding("driver", f"NVIDIA {driver}")
    if torch.cuda.is_available():
        yield from map(find_gpu, range(torch.cuda.device_count()))
    elif driver is None:
        yield Finding("GPU", "none found")
    elif torch_build() == "CPU build":
        yield Finding("GPU", "not usable: this torch is a CPU build", advice=INSTALL_TORCH)
    else:
        reason, visible = "it gives no reason", os.environ.get("CUDA_VISIBLE_DEVICES")
        advice = f"CUDA_VISIBLE_DEVICES={visible!r} is set, which may hide it: unset it"
        if visible is None:
            advice = f"update the driver, or install a torch that fits it: {INSTALL_TORCH}"
        try:
            torch.cuda.init()
        except Exception as error:
            reason = parity.first_line(error)
        yield Finding("GPU", f"not usable by torch ({reason})", advice=advice)


def find_gpu(index: int) -> Finding:
    """Describe one GPU that torch sees."""
    gpu = torch.cuda.get_device_properties(index)
    name, value, advice = f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB", ""
    if torch.version.hip is not None:
        return Finding(name, f"{value}, {gpu.gcnArchName}")
    capability, built_for = (gpu.major, gpu.minor), " ".join(torch.cuda.get_arch_list())
    targets = [(kind, divmod(int(n), 10)) for kind, n in re.findall(r"(sm|compute)_(\d+)", built_for)]
    # sm_XY runs on X.Y and later minors of X, compute_XY on everything later.
    fits = [kind == "compute" or target[0] == gpu.major for kind, target in targets if target <= capability]
    if targets and not any(fits):
        advice = f"this torch has no code for it: {INSTALL_TORCH}"
    elif capability < OLDEST_GPU:
        advice = "the kernels are not tested below 7.5; use --device cpu"
    return Finding(name, f"{value}, compute capability {gpu.major}.{gpu.minor}", advice=advice)


def find_compiler(device: torch.device) -> Iterator[Finding]:
    """Find the compiler that torch.compile needs: C++ on a CPU; on a GPU, C, which builds Triton's launcher."""
    name, variable, uses, usual = "C compiler", "CC", "Triton (and with it torch.compile)", ["gcc", "clang"]
    if device.type == "cpu":
        name, variable, uses = "C++ compiler", "CXX", "torch.compile"
        usual = [{"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")]
    candidates = [os.environ[variable]] if variable in os.environ else usual
    path = next(filter(None, map(shutil.which, candidates)), None)
    header = Path(sysconfig.get_config_var("INCLUDEPY") or sysconfig.get_path("include")) / "Python.h"
    value, advice = f"{path}, so {uses} can work", ""
    if path is None:
        value, advice = f"no {' or '.join(candidates)}, which {uses} needs", f"install one, or set {variable} to one"
    elif not header.exists():
        value, advice = f"{path}, but no Python.h, which {uses} needs", "install Python's headers"
    elif device.type != "cpu" and why_not_triton(device) is not None:
        value = f"{path}, but torch.compile needs triton, too"
    yield Finding(name, value, advice=advice)


def find_backend(device: torch.device) -> Iterator[Finding]:
    """Name the backend that the fused operation chooses on `device`."""
    backend, reason = choose_backend(torch.empty(1, device=device)), why_not_triton(device)
    value, advice = f"{backend} on {device}", ""
    if backend == "aten":
        value += f", the steps of eager PyTorch; {reason}"
        value += " (for tests: it is slow)" if device.type == "cpu" and "interpreter" in str(reason) else ""
    if is_interpreted():
        advice = f"{INTERPRETER} is set: kernels are interpreted, which is slow and meant for tests; unset it"
    yield Finding("backend", value, advice=advice)


def find_precision(device: torch.device) -> Iterator[Finding]:
    """Name the precision that `train` chooses, and why."""
    precision, reason = choose_precision(device), "this processor has instructions for it"
    if precision == "fp32":
        reason = "this processor has no bf16 instructions, so bf16 would be emulated and slower"
    elif precision == "fp16":
        reason = "this GPU has no bf16 instructions; the loss is scaled"
    yield Finding("precision", f"{precision} for train: {reason}")


def find_tuning(device: torch.device) -> Iterator[Finding]:
    """Name the table that chooses implementations, or the reason why it is not used."""
    if (reason := why_not(device)) is not None:
        return (yield Finding("tuning", reason))
    if choices.is_off():
        return (yield Finding("tuning", f"off: {DEFAULTS_RUN}", advice=f"{choices.SWITCH}=0 is set: unset it"))
    path, entries, problem = choices.find_table(choices.environment_of(device))
    if problem:
        yield Finding("tuning", f"{path} is not used: {problem}", advice=choices.AGAIN)
    elif entries:
        yield Finding("tuning", f"tuned: {format_changed(entries)}, from {path}")
    else:
        yield Finding("tuning", f"not tuned: {DEFAULTS_RUN}", advice="run `resnet-fast tune`")


def check_parity(device: torch.device) -> Iterator[Finding]:
    """Compare results with the formula in fp64: one line if all are right, else one for each wrong case."""
    half = torch.bfloat16 if choose_precision(device) == "bf16" else torch.float16
    begin = time.perf_counter()
    checks = parity.self_check(device, half)
    seconds = time.perf_counter() - begin
    if wrong := [check for check in checks if check.share > 1]:
        advice = "do not train on this device; please report it with this output"
        yield Finding("parity", f"{len(wrong)} of {len(checks)} checks failed, in {seconds:.1f} s", False, advice)
        yield from (Finding("", f"{check.case}: {check.result}", ok=False) for check in wrong)
        return
    value = f"right: {len(checks)} of {parity.N_CHECKS} checks, in fp32, {parity.NAMES[half]} and fp64, used at most "
    value += f"{max(check.share for check in checks):.0%} of their error budget; {seconds:.1f} s"
    late = "the time ran out: run it again for the other checks; compiled kernels are kept"
    yield Finding("parity", value, advice=late if len(checks) < parity.N_CHECKS else "")


def format_finding(finding: Finding) -> list[str]:
    """Return the lines of a finding: plain text, aligned, at most 80 columns."""
    mark = "FAIL" if not finding.ok else "note" if finding.advice else "ok"
    lines = []
    for begin, text in ((f"{mark:<6}{finding.name:<14}", finding.value), (f"{'':20}-> ", finding.advice)):
        indent = " " * len(begin)
        lines += textwrap.wrap(text, 80, initial_indent=begin, subsequent_indent=indent, break_on_hyphens=False)
    return lines


def format_end(findings: Collection[Finding]) -> str:
    """Return the last line: the result in one sentence."""
    if failed := dict.fromkeys(finding.name for finding in findings if not finding.ok and finding.name):
        return f"Something is wrong: {', '.join(failed)}."
    return "Everything required works; see the notes." if any(f.advice for f in findings) else "All is well."

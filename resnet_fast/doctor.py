"""`resnet-fast doctor`: what is there, what runs on this machine and why, and what to do where something is missing.

    findings = diagnose("auto")
    exit_code(findings)  # 0, or 1 where a needed package is missing or broken, or a result is wrong

Nothing on the machine is changed, but for kernels that Triton compiles and keeps in its cache.
"""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from . import _torchvision, parity
from .ops import batch_norm, choice_files
from .training.config import choose_device, choose_precision
from .tuning import why_not

# As in setup.py; the library works without the optional ones.
TORCH, TRITON = "2.11", "3.6"
NEEDED = {"torchvision": "0.26", "numpy": "1.26", "pillow": "10"}
OPTIONAL = {"matplotlib": "3.8", "rich": "13", "scikit-learn": "1.4", "typer": "0.12"}
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}  # where the import has another name

OLDEST_GPU = (7, 5)  # the kernels are compiled for sm_75 and later (docs/kernels.md)
NVIDIA_MODULE = Path("/proc/driver/nvidia/version")
INSTALL_TORCH = "choose the build at https://pytorch.org/get-started/locally and run the command shown there"
WIDTH, NAME_WIDTH = 80, 14
DEFAULTS_RUN = "convolutions are cuDNN's, batch norms take two passes"


@dataclass(frozen=True)
class Finding:
    """One line: what is, whether that is all right, and what to do. Advice beside `ok` is no failure."""

    name: str
    value: str
    ok: bool = True
    advice: str = ""


def diagnose(device: str = "auto", show: Callable[[Finding], None] = lambda finding: None) -> list[Finding]:
    """Look at everything, then check what is computed on `device`; takes about 10 seconds at most.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N", as for training.
        show: gets each finding as soon as there is one.

    Raises:
        ValueError: there is no such device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of old drivers and GPUs; the findings say so themselves
        chosen = choose_device(device)
        findings = []
        for name, probe in _probes(chosen).items():
            try:
                found = probe()
            except Exception as error:  # one line that fails leaves the others; what cannot be checked is not right
                found = [Finding(name, f"cannot be told: {parity.describe(error)}", ok=name != "parity")]
            for finding in found:
                show(finding)
                findings.append(finding)
    return findings


def _probes(device: torch.device) -> dict[str, Callable[[], list[Finding]]]:
    probes: dict[str, Callable[[], list[Finding]]] = {"Python": find_python, "torch": find_torch}
    for needed, packages in ((True, NEEDED), (False, OPTIONAL)):
        probes |= {name: partial(find_package, name, at_least, needed) for name, at_least in packages.items()}
    return probes | {
        "triton": find_triton,
        "GPU": find_gpus,
        "compiler": partial(find_compiler, device),
        "backend": partial(find_backend, device),
        "precision": partial(find_precision, device),
        "tuning": partial(find_tuning, device),
        "parity": partial(check_parity, device),
    }


def exit_code(findings: Iterable[Finding]) -> int:
    """0 where everything that has to work works, else 1."""
    return 0 if all(finding.ok for finding in findings) else 1


def find_python() -> list[Finding]:
    return [Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")]


def find_torch() -> list[Finding]:
    value = f"{torch.__version__}, {torch_build()}"
    if _numbers(torch.__version__) < _numbers(TORCH):
        return [Finding("torch", f"{value}; {TORCH} or later is needed", ok=False, advice=INSTALL_TORCH)]
    return [Finding("torch", value)]


def torch_build() -> str:
    """What the installed torch was built for."""
    for name, of in (("cuda", "CUDA"), ("hip", "ROCm"), ("xpu", "XPU")):
        if (version := getattr(torch.version, name, None)) is not None:
            return f"{of} {version} build"
    return "CPU build"


def find_package(name: str, at_least: str, needed: bool) -> list[Finding]:
    """A package: imported, for only that tells whether it is whole, and not too old."""
    advice, module_name = f"pip install '{name}>={at_least}'", MODULES.get(name, name)
    try:
        module = importlib.import_module(module_name)
        version = getattr(module, "__version__", None) or metadata.version(name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module_name
        value = "not installed" if missing else f"cannot be imported ({parity.describe(error)})"
        return [Finding(name, value, ok=not needed, advice=advice)]
    if _numbers(version) < _numbers(at_least):
        return [Finding(name, f"{version}; {at_least} or later is needed", ok=not needed, advice=advice)]
    if name == "torchvision" and _torchvision.schemas is not None:
        version += "; its compiled operators do not fit this torch, none is used here"
    return [Finding(name, version)]


def find_triton() -> list[Finding]:
    """Never a failure: without triton ATen computes the same."""
    (finding,) = find_package("triton", TRITON, needed=False)
    if not finding.advice:
        return [finding]
    if platform.system() != "Linux":
        return [Finding("triton", f"{finding.value}; it is for Linux, ATen runs here")]
    return [Finding("triton", finding.value, advice=f"{finding.advice}; until then nothing is fused")]


def find_gpus() -> list[Finding]:
    """NVIDIA's driver and the GPUs that torch sees, or why it sees none."""
    driver = nvidia_driver()
    findings = [] if driver is None else [Finding("driver", f"NVIDIA {driver}")]
    if torch.cuda.is_available():
        return findings + [find_gpu(index) for index in range(torch.cuda.device_count())]
    if driver is None:
        return [Finding("GPU", "none found")]
    if torch_build() == "CPU build":
        return [*findings, Finding("GPU", "not usable: this torch is a CPU build", advice=INSTALL_TORCH)]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        advice = f"CUDA_VISIBLE_DEVICES={hidden!r} is set, which may hide it: unset it"
    else:
        advice = f"update the driver, or take a torch that fits it: {INSTALL_TORCH}"
    return [*findings, Finding("GPU", f"not usable by torch ({_why_no_cuda()})", advice=advice)]


def find_gpu(index: int) -> Finding:
    """One GPU that torch sees."""
    name = f"cuda:{index}"
    gpu = torch.cuda.get_device_properties(index)
    value = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB"
    if torch.version.hip is not None:
        return Finding(name, f"{value}, {gpu.gcnArchName}")
    capability = (gpu.major, gpu.minor)
    value += f", compute capability {gpu.major}.{gpu.minor}"
    if not has_code_for(capability, torch.cuda.get_arch_list()):
        return Finding(name, value, advice=f"this torch holds no code for it: {INSTALL_TORCH}")
    if capability < OLDEST_GPU:
        return Finding(name, value, advice="older than 7.5, for which the kernels are not tested; use --device cpu")
    return Finding(name, value)


def has_code_for(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a CUDA build runs on a GPU: sm_XY runs on X.Y and later minors of X, compute_XY on everything later."""
    for target in built_for:
        kind, _, digits = target.partition("_")
        if not (match := re.match(r"\d+", digits)):
            continue
        major, minor = divmod(int(match[0]), 10)
        if (major, minor) <= capability and (kind == "compute" or major == capability[0]):
            return True
    return not built_for  # nothing is known


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, None where there is none."""
    if NVIDIA_MODULE.exists() and (match := re.search(r"\s(\d+\.[\d.]+)\s", NVIDIA_MODULE.read_text())):
        return match[1]
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else None


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return parity.describe(error)
    return "for a reason that it does not give"


def find_compiler(device: torch.device) -> list[Finding]:
    """What torch.compile needs: on a CPU a C++ compiler; on a GPU Triton, whose launcher a C compiler builds."""
    if device.type == "cpu":
        name, uses = "C++ compiler", "torch.compile"
        default = {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
        variable, candidates = "CXX", [os.environ.get("CXX", default)]
    else:
        name, uses = "C compiler", "Triton (and with it torch.compile)"
        variable, candidates = "CC", [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    path = next((found for candidate in candidates if (found := shutil.which(candidate))), None)
    if path is None:
        advice = f"install one, or set {variable} to one"
        return [Finding(name, f"no {' or '.join(candidates)}, which {uses} needs", advice=advice)]
    header = Path(sysconfig.get_config_var("INCLUDEPY") or sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return [Finding(name, f"{path}, but no Python.h, which {uses} needs", advice="install Python's headers")]
    if device.type != "cpu" and batch_norm.why_not_triton(device) is not None:
        return [Finding(name, f"{path}, but torch.compile needs triton, too")]
    return [Finding(name, f"{path}, so {uses} can work")]


def find_backend(device: torch.device) -> list[Finding]:
    """What computes the fused operation on `device`, as the operation itself chooses it."""
    backend = batch_norm.choose_backend(torch.empty(1, device=device))
    reason = batch_norm.why_not_triton(device)
    value = f"{backend} on {device}"
    if backend == "aten":
        value += f", which is eager PyTorch's own steps; {reason}"
        if device.type == "cpu" and "interpreter" in str(reason):
            value += " (for tests: it is slow)"
    if not batch_norm.is_interpreted():
        return [Finding("backend", value)]
    advice = f"{batch_norm.INTERPRETER} is set: kernels are interpreted, which is for tests, and slow; unset it"
    return [Finding("backend", value, advice=advice)]


def find_precision(device: torch.device) -> list[Finding]:
    precision = choose_precision(device)
    reason = {
        "bf16": "this processor computes in it",
        "fp32": "this processor has no bf16 instructions, so bf16 would be emulated and slower",
    }[precision]
    return [Finding("precision", f"{precision} for train: {reason}")]


def find_tuning(device: torch.device) -> list[Finding]:
    """By which table implementations are chosen, and the tables that are there and do not count."""
    if (reason := why_not(device)) is not None:
        return [Finding("tuning", reason)]
    if choice_files.is_off():
        return [Finding("tuning", f"off: {DEFAULTS_RUN}", advice=f"{choice_files.SWITCH}=0 is set: unset it")]
    tables = choice_files.find_tables(choice_files.environment_of(device))
    findings = []
    for path, problem, advice in (
        (tables.own, tables.problem, choice_files.AGAIN),
        (tables.built_in, tables.built_in_problem, "`resnet-fast tune` makes one of your own"),
    ):
        if problem:
            findings.append(Finding("tuning", f"{path} is not used: {problem}", advice=advice))
    used = [
        f"{choice_files.count_changed(entries)} of {len(entries)} entries differ from the default, from {origin}{path}"
        for origin, path, entries in (
            ("", tables.own, tables.entries),
            ("the built-in ", tables.built_in and tables.built_in.name, tables.built_in_entries),
        )
        if entries
    ]
    if used:
        findings.append(Finding("tuning", f"tuned: {'; and '.join(used)}"))
    elif not findings:
        findings = [Finding("tuning", f"not tuned: {DEFAULTS_RUN}", advice="run `resnet-fast tune`")]
    if tables.others:
        names = ", ".join(path.name for path in tables.others)
        value = f"tables of other versions, not used: {names} in {tables.others[0].parent}"
        findings.append(Finding("tuning", value, advice="delete those whose versions are no longer installed"))
    return findings


def check_parity(device: torch.device) -> list[Finding]:
    """Compute, and compare with the formula in fp64: one line where all is well, else one for each wrong case."""
    half = torch.bfloat16 if choose_precision(device) == "bf16" else torch.float16
    start = time.perf_counter()
    checks = parity.self_check(device, half)
    seconds = time.perf_counter() - start
    wrong, done = [check for check in checks if not check.ok], [check for check in checks if not check.skipped]
    if wrong:
        advice = "do not train on this device; please report it with this output"
        findings = [Finding("parity", f"{len(wrong)} of {len(done)} checks failed, in {seconds:.1f} s", False, advice)]
        return findings + [Finding("", f"{check.case}: {describe_failure(check)}", ok=False) for check in wrong]
    value = f"right: {len(done)} of {len(checks)} checks, in fp32, {parity.NAMES[half]} and fp64, took at most "
    value += f"{max(check.used for check in done):.0%} of their error budget; {seconds:.1f} s"
    advice = "run again for the rest: compiling took the time, and is not repeated" if len(done) < len(checks) else ""
    return [Finding("parity", value, advice=advice)]


def describe_failure(check: parity.Check) -> str:
    return check.problem or f"{check.result} is off by {check.error:.2g}, allowed {check.allowed:.2g}"


def format_finding(finding: Finding) -> list[str]:
    """The lines of a finding: aligned, at most 80 columns, plain."""
    mark = "FAIL" if not finding.ok else "note" if finding.advice else "ok"
    indent = " " * (6 + NAME_WIDTH)
    lines = _wrap(finding.value, f"{mark:<6}{finding.name:<{NAME_WIDTH}}", indent)
    return lines + (_wrap(finding.advice, f"{indent}-> ", f"{indent}   ") if finding.advice else [])


def format_end(findings: Iterable[Finding]) -> str:
    """The last line: the result in one sentence."""
    findings = list(findings)
    if failed := dict.fromkeys(finding.name for finding in findings if not finding.ok and finding.name):
        return f"Something is wrong: {', '.join(failed)}."
    return "What is needed works; see the notes." if any(f.advice for f in findings) else "All is well."


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _numbers(version: str) -> tuple[int, ...]:
    """ "2.11.0a0+git" -> (2, 11), enough to compare."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:2])

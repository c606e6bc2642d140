"""What a measurement says about the machine on which it was taken, and what a training run asks of it."""

import ctypes
import platform
import re
import subprocess
from pathlib import Path

import torch

NVIDIA_MODULE = Path("/proc/driver/nvidia/version")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for this process instead of returning it to the system; other C libraries ignore it.

    A training step on a CPU frees and allocates the same gradients again. Returned, each of their pages is mapped and
    zeroed anew in every step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the CPU model, as its maker writes it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        cpuinfo = ""
    match = re.search(r"^model name\s*:\s*(\S.*)$", cpuinfo, re.MULTILINE)
    return (match[1] if match else platform.processor() or platform.machine() or "unknown CPU").strip()


def slug(name: str) -> str:
    """Return `name` in lower-case letters, digits and single hyphens, without trade marks and clock rate."""
    name = re.sub(r"\((r|tm|c)\)|@.*", " ", name.lower())
    return "-".join(re.findall(r"[a-z0-9]+", name)) or "unknown"


def triton_version() -> str:
    """Return triton's version, or nothing where there is none."""
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def nvidia_driver() -> str | None:
    """Return the version of NVIDIA's driver, None where there is none."""
    if NVIDIA_MODULE.exists() and (match := re.search(r"\s(\d+\.[\d.]+)\s", NVIDIA_MODULE.read_text())):
        return match[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None

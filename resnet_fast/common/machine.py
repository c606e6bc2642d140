"""Facts about this machine, for the records of measurements."""

import platform
import re
import subprocess
from pathlib import Path

import torch

NVIDIA_MODULE = Path("/proc/driver/nvidia/version")


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
    """Return Triton's version, or "" if it is not installed."""
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def nvidia_driver() -> str | None:
    """Return the version of NVIDIA's driver, or None."""
    if NVIDIA_MODULE.exists() and (match := re.search(r"\s(\d+\.[\d.]+)\s", NVIDIA_MODULE.read_text())):
        return match[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None

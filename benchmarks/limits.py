"""The machine's copy bandwidth and matrix rates, measured in the same run: the roof over every figure."""

from typing import NamedTuple

import torch

from benchmarks.work import Work
from resnet_fast.evaluation.logits import DTYPES
from resnet_fast.training.config import choose_precision
from resnet_fast.tuning.timing import alternate, percentiles

# Far larger than the caches, and small enough for a small machine.
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
ROUNDS = {"cpu": 10, "cuda": 30}
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": tuple(DTYPES)}  # precisions of matrix products
# Names of x86 and ARM processors' bf16 instructions in torch.cpu.get_capabilities().
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


class Limits(NamedTuple):
    """Copy bandwidth in bytes/s, read plus written; matrix rate in operations/s, 2 per multiply-add, by precision.

    An emulated precision has no rate.
    """

    copy: float
    matrix: dict[str, float]

    def floor_ms(self, work: Work, precision: str) -> float | None:
        """Return the serial floor in ms: all bytes at the copy bandwidth, then all operations at the matrix rate."""
        if work.flops and precision not in self.matrix:
            return None
        seconds = work.bytes / self.copy + (work.flops / self.matrix[precision] if work.flops else 0)
        return 1e3 * seconds


def is_emulated(precision: str, device: torch.device) -> bool:
    """Return whether the processor has no instructions for the precision and computes in fp32 instead.

    A matrix product in an emulated precision is some hundred times slower than in fp32.
    """
    if precision != "bf16":
        return False
    if device.type == "cuda":
        return choose_precision(device) != "bf16"
    return not any(torch.cpu.get_capabilities().get(name) for name in BF16_INSTRUCTIONS)


def quick_precision(device: torch.device) -> str:
    """Return the precision of a quick run: bf16, or if the processor emulates it, that of training on it."""
    if not is_emulated("bf16", device):
        return "bf16"
    return choose_precision(device) if device.type == "cuda" else "fp32"


def precisions(device: torch.device, quick: bool) -> list[str]:
    """Return the precisions of a level: fp16 on GPUs only (CPUs are slow in it), bf16 unless a GPU emulates it."""
    if quick:
        return [quick_precision(device)]
    if device.type == "cpu":
        return ["bf16", "fp32"]
    return [precision for precision in ("bf16", "fp16", "fp32") if not is_emulated(precision, device)]


def measure_limits(device: torch.device) -> Limits:
    """Return the limits by median times of a copy and of square matrix products, on random data.

    On a GPU fp32 products round to TF32, as cuDNN's convolutions do by torch's default.
    """
    source = torch.empty(COPY_BYTES[device.type] // 4, device=device).uniform_()
    target = torch.empty_like(source)
    copy_ms = _median_ms(lambda: target.copy_(source), device)
    n = MATRIX_SIZE[device.type]
    square = source[: n * n].view(n, n)
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        matrix = {}
        for precision in PRECISIONS[device.type]:
            if is_emulated(precision, device):
                continue
            a = square.to(DTYPES[precision])
            b = a.t().contiguous()
            matrix[precision] = 2e3 * n**3 / _median_ms(lambda a=a, b=b: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return Limits(2e3 * source.nbytes / copy_ms, matrix)


def _median_ms(call, device: torch.device) -> float:
    (times,) = alternate({"": call}, device, ROUNDS[device.type], warm_up=3, hide_launches=True).values()
    return percentiles(times)[1]

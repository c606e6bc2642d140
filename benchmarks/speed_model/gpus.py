"""The GPUs that the speed model knows, with the source of every figure.

Multiprocessors, boost clock, L2 size and matrix peaks (dense; GeForce: with fp32 accumulation) are from the vendor's
data sheets and architecture whitepapers. The rest:

- clock_ghz: H200 and T4 below the boost clocks (1.98, 1.59), since power limits them; assumed.
- memory_gb_s is that of a copy, reads plus writes. H200: 4.3 of 4.8 TB/s, measured on such a GPU before this project,
  without a record here. A100 with 80 GB: 1.7 of 2.04 TB/s, as in Triton's vector-addition tutorial. Others: assumed to
  be 90 % of the data sheet (RTX 4090: 1,008; RTX 3090: 936), for the T4 81 % of 320.
- l2_gb_s, memory_ns and l2_ns are assumed: round numbers in the range that microbenchmarks report (arXiv 2402.13499 for
  Hopper, Ada and Ampere, 2208.11174 for Ampere, 1903.07486 for T4), but not taken from their tables.
- launch_us, the shortest time between two small kernels in a stream or a graph, is assumed.
"""

from enum import StrEnum
from typing import NamedTuple


class Architecture(NamedTuple):
    """Limits of a multiprocessor, which has 65,536 registers and four schedulers on every GPU here.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".

    fp32_lanes: multiply-adds in fp32 that a scheduler starts per cycle.
    parameters: offset of a kernel's parameters in the constant bank, in bytes (read off compiled kernels).
    """

    max_warps: int
    max_programs: int
    shared_kb: int
    fp32_lanes: int
    parameters: int


ARCHITECTURES = {
    75: Architecture(32, 16, 64, 16, 0x160),
    80: Architecture(64, 32, 164, 16, 0x160),
    86: Architecture(48, 16, 100, 32, 0x160),
    89: Architecture(48, 24, 100, 32, 0x160),
    90: Architecture(64, 32, 228, 32, 0x210),
}


# Largest share of the L2 cache for one of the few tensors that a kernel reads and writes. Assumed.
L2_SHARE = 0.2


class Gpu(NamedTuple):
    """Bandwidths in 10⁹ bytes/s, unloaded latencies in ns, dense matrix peaks in 10¹² operations/s."""

    name: str  # part of the driver's name for it
    capability: int
    multiprocessors: int
    clock_ghz: float
    memory_gb_s: float
    l2_gb_s: float
    l2_mb: float
    memory_ns: float
    l2_ns: float
    tflops_16_bit: float
    tflops_fp32: float  # of fp32 products with torch's default for cuDNN: TF32 if the GPU has it
    launch_us: float

    @property
    def has_bf16(self) -> bool:
        return self.capability >= 80

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.capability]

    def holds(self, n_bytes: float) -> bool:
        """Return whether the L2 cache serves a tensor of this size that another kernel has just read or written."""
        return n_bytes <= L2_SHARE * self.l2_mb * 1e6


GPUS = {
    "h200": Gpu("H200", 90, 132, 1.75, 4300, 6000, 50, 550, 200, 989, 495, 2.5),
    "a100": Gpu("A100", 80, 108, 1.41, 1700, 3500, 40, 500, 200, 312, 156, 2.5),
    "rtx4090": Gpu("RTX 4090", 89, 128, 2.52, 910, 4000, 72, 450, 170, 165, 83, 2.5),
    "rtx3090": Gpu("RTX 3090", 86, 82, 1.70, 840, 2000, 6, 450, 200, 71, 36, 2.5),
    "t4": Gpu("T4", 75, 40, 1.35, 260, 900, 4, 500, 200, 65, 8.1, 3.0),
}

GpuName = StrEnum("GpuName", list(GPUS))

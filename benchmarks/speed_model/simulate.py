"""Simulates one multiprocessor that runs a kernel's machine code, and predicts the kernel's time.

Warps issue in order, one instruction per scheduler and cycle, and wait for registers, pipes, barriers and memory. Memory
is a latency and a queue at the multiprocessor's share of the bandwidth.
"""

from typing import NamedTuple

from .gpus import Gpu


class Instruction(NamedTuple):
    """One instruction; `target` is the position of the instruction that a branch goes to."""

    text: str
    target: int | None


class Code(NamedTuple):
    """A program's machine code: registers a thread, bytes of shared memory and warps of a program."""

    instructions: tuple[Instruction, ...]
    registers: int
    shared: int
    warps: int


class Work(NamedTuple):
    """What one launch has to do.

    grid: programs.
    image_parameters: where pointers to image-sized tensors lie in the constant bank (`launches.parameter_offsets`);
        only their accesses use memory bandwidth, what else is loaded comes from the L2 cache.
    image_bytes: bytes of images that the launch has to read and write, ReLU bits included.
    program_reads: bytes that one program reads of a tensor, by the pointer's offset in the constant bank, for every
        tensor over which a program may loop: images (bytes / grid) and partial results (their columns, whole). A loop
        that loads from such a tensor takes as many trips as that needs; another loop takes one.
    """

    grid: int
    image_parameters: frozenset[int]
    image_bytes: float
    program_reads: dict[int, float]


class Prediction(NamedTuple):
    """us: the kernel's time, without its launch. bound: "bytes", "issue", "pipe" or "latency", the first three where
    the time is at most a quarter above what they alone would take.

    roof: the bytes' share of the time, at the bandwidth of what serves them.
    registers: a thread. resident: programs that a multiprocessor holds. waves: grid / (resident · multiprocessors).
    bytes_in_flight: of a multiprocessor, the most.
    instructions: of all threads. serial_steps: accesses of memory one after the other in one program.
    """

    us: float
    bound: str
    roof: float
    registers: int
    resident: int
    waves: float
    bytes_in_flight: float
    instructions: float
    serial_steps: int


def read_code(cubin: bytes, warps: int, shared: int) -> Code:
    """Return the machine code in a cubin, listed by Triton's cuobjdump."""
    raise NotImplementedError


def predict(code: Code, work: Work, gpu: Gpu, in_l2: bool) -> Prediction:
    """Predict a launch; `in_l2`: whether the L2 cache serves the images."""
    raise NotImplementedError

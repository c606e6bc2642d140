"""A stub CUDA driver that executes nothing, on which Triton compiles, binds and launches kernels on CPU tensors.

It serves to measure the host time of launches (host_cost.py), and to detect launches that a real driver would refuse
(tests/stub_step.py). It must be put in place before the kernels are imported, in a separate process.
"""

import atexit
import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """Limits of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").

    shared_per_program, shared: bytes of shared memory. threads, programs: the most that are resident.
    multiprocessors: their number on the GPU.
    """

    shared_per_program: int
    shared: int
    threads: int
    programs: int
    multiprocessors: int


GPUS = {
    70: Gpu(96 << 10, 96 << 10, 2048, 32, 80),  # V100
    75: Gpu(64 << 10, 64 << 10, 1024, 16, 40),  # T4
    80: Gpu(163 << 10, 164 << 10, 2048, 32, 108),  # A100
    86: Gpu(99 << 10, 100 << 10, 1536, 16, 82),  # RTX 3090
    89: Gpu(99 << 10, 100 << 10, 1536, 24, 128),  # RTX 4090
    90: Gpu(227 << 10, 228 << 10, 2048, 32, 132),  # H200
    100: Gpu(227 << 10, 228 << 10, 2048, 32, 148),  # B200
    120: Gpu(99 << 10, 100 << 10, 1536, 24, 170),  # RTX 5090
}


class Launch(NamedTuple):
    """A launch as the driver received it; a pointer among the parameters is its address, any other its bytes."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    registers: int
    parameters: tuple[int | bytes, ...]


WATCHER = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),  # CUlaunchConfig begins with grid, block and shared memory
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
)
GLOBAL_SPACE = 4  # memory space of pointer parameters
_library: ctypes.CDLL | None = None


def build(folder: Path) -> None:
    """Compile the driver as libcuda.so.1.

    Raises:
        RuntimeError: Triton with its NVIDIA backend, or a C compiler, is missing.
    """
    compiler, *options = shlex.split(os.environ.get("CC", "gcc"))
    backend = find_spec("triton") and find_spec("triton.backends.nvidia")
    if shutil.which(compiler) is None or not backend or backend.origin is None:
        raise RuntimeError("the stub driver needs a C compiler (gcc, or CC) and Triton with its NVIDIA backend")
    headers, source = Path(backend.origin).parent / "include", Path(__file__).with_name("fake_cuda.c")
    subprocess.run(
        [
            compiler,
            *options,
            "-shared",
            "-fPIC",
            "-Wl,-soname,libcuda.so.1",
            "-I",
            headers,
            source,
            "-o",
            folder / "libcuda.so.1",
        ],
        check=True,
    )


def put_in_place(capability: int = 90) -> None:
    """Make Triton launch on the stub driver, and resnet_fast treat CPU tensors as those of the GPU GPUS[capability]."""
    global _library
    folder = Path(mkdtemp(prefix="stub-driver-"))
    atexit.register(shutil.rmtree, folder)
    build(folder)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_INTERPRET"] = "0"
    _library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    (ctypes.c_int * 6).in_dll(_library, "stub_gpu")[:] = (capability, *GPUS[capability])
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    class StubDriver(CudaDriver):
        def __init__(self) -> None:  # the original asks torch for a GPU
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return divmod(capability, 10)

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

    driver.set_active(StubDriver())
    from resnet_fast.ops import backend, launch, single_read

    why_not = backend.why_not_triton
    for module, name, value in (
        (backend, "why_not_triton", lambda device: None if device.type == "cpu" else why_not(device)),
        (launch, "nvidia_capability", lambda device: capability),
        (launch, "has_pdl", lambda device: capability >= 90),
        (single_read, "multiprocessors", lambda device: GPUS[capability].multiprocessors),
    ):
        setattr(module, name, value)
    torch.version.cuda = torch.version.cuda or "13.0"


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches that the driver accepts inside the context."""
    launches: list[Launch] = []

    @WATCHER
    def note(name, config, registers, n_parameters, places, sizes, spaces) -> None:
        values = [ctypes.string_at(places[i], sizes[i]) for i in range(n_parameters)]
        parameters = tuple(
            int.from_bytes(value, sys.byteorder) if spaces[i] == GLOBAL_SPACE else value
            for i, value in enumerate(values)
        )
        x, y, z, *block, shared = config[:7]
        threads = block[0] * block[1] * block[2]
        launches.append(Launch(name.decode(), (x, y, z), threads, shared, registers, parameters))

    assert _library is not None, "put_in_place comes first"
    watcher = ctypes.c_void_p.in_dll(_library, "stub_watcher")
    watcher.value = ctypes.cast(note, ctypes.c_void_p).value
    try:
        yield launches
    finally:
        watcher.value = None

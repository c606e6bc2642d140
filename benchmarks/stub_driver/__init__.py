"""A CUDA driver that executes nothing, in front of which Triton compiles, binds and launches kernels on CPU tensors.

What it is for: what a launch costs the host (host_cost.py), and whether a launch would be refused. It has to be put in
place before the kernels are imported, in a process of its own.
"""

import atexit
import ctypes
import os
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from unittest import mock

import torch


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
    """Have Triton launch on the stub driver, and resnet_fast take CPU tensors for a GPU's of this capability."""
    folder = Path(mkdtemp(prefix="stub-driver-"))
    atexit.register(shutil.rmtree, folder)
    build(folder)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_INTERPRET"] = "0"
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
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
    from resnet_fast.ops import backend, launch

    for module, name, value in (
        (backend, "why_not_triton", lambda device: None),
        (launch, "nvidia_capability", lambda device: capability),
        (launch, "has_pdl", lambda device: capability >= 90),
    ):
        mock.patch.object(module, name, value).start()
    torch.version.cuda = torch.version.cuda or "13.0"

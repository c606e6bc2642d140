"""Capture the kernels that torch.compile generates for a training step of ResNet-18, without a GPU.

    python -m benchmarks.speed_model.capture fake_cuda.so capture h200 128 bf16 resnet18 captured.pickle

torch is patched to pretend that the GPU exists, so this runs in a separate process (`inductor.run_capture`). Its
tensors are fake; nothing is computed.
"""

import ctypes
import importlib.util
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest.mock import patch

from benchmarks.speed_model.gpus import GPUS, Gpu


class Candidate(NamedTuple):
    """A kernel compiled with one of Inductor's configurations."""

    blocks: dict[str, int]  # XBLOCK, YBLOCK, R0_BLOCK
    warps: int
    shared: int
    cubin: bytes


class Kernel(NamedTuple):
    """A generated kernel; `signature` has every argument's type, "constexpr" if it is not passed."""

    source: str
    signature: dict[str, str]
    candidates: list[Candidate]


class Launch(NamedTuple):
    """A launch. By argument name, `tensors` has elements and bytes per element, and `sizes` the integers."""

    kernel: str
    tensors: dict[str, tuple[int, int]]
    sizes: dict[str, int]


class Captured(NamedTuple):
    """The kernels by name, and their launches in order."""

    kernels: dict[str, Kernel]
    launches: list[Launch]


def load_before_torch(library: str) -> None:
    """Load the hooks for CUDA, which torch looks for only once, when it is imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    for path in (Path(spec.origin).parent / "lib/libc10.so", Path(spec.origin).parent / "lib/libtorch_cpu.so", library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def returning(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


class NoDevice:
    """Replaces the context managers that switch devices."""

    def __init__(self, *args: Any) -> None:
        self.idx = 0

    def __enter__(self) -> None: ...

    def __exit__(self, *args: Any) -> None: ...


def pretend_gpu(gpu: Gpu) -> None:
    """Patch torch and Triton so that Inductor generates code for the GPU."""
    import torch
    import triton
    from torch._dynamo import device_interface
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget

    capability = divmod(gpu.capability, 10)
    architecture = gpu.architecture
    properties = SimpleNamespace(
        name=gpu.name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=gpu.multiprocessors,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=32 * architecture.max_warps,
        max_threads_per_block=1024,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=(architecture.shared_kb - 1) * 1024,
        shared_memory_per_multiprocessor=architecture.shared_kb * 1024,
        L2_cache_size=int(gpu.l2_mb * 2**20),
        total_memory=2**34,
    )
    stream = SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": gpu.has_bf16,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "current_stream": stream,
        "synchronize": None,
        "memory_allocated": 0,
        "get_rng_state": torch.get_rng_state(),
        "set_rng_state": None,
    }
    interface: Any = device_interface.CudaInterface
    for name, answer in answers.items():
        setattr(torch.cuda, name, returning(answer))
        setattr(interface, name, staticmethod(returning(answer)))
    interface.get_raw_stream = staticmethod(returning(0))
    interface.Worker.get_device_properties = staticmethod(returning(properties))
    interface.Worker.current_device = staticmethod(returning(0))
    interface.device = torch.cuda.device = torch.cuda._DeviceGuard = NoDevice  # type: ignore[assignment, misc]
    torch.cuda._lazy_init = returning(None)
    torch.version.cuda = "12.8"
    for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
        setattr(torch._C, name, returning(0))
    fake_tensor.init_gpu_context = returning(None)
    fake_tensor.FakeTensorMode.avoid_device_init = property(returning(True))  # type: ignore[assignment]

    # Folding evaluates a one-element tensor on its device; use the CPU instead.
    evaluate = UniformValueConstantFolder._deduce_value

    def evaluate_on_cpu(self: Any, node: torch.fx.Node) -> Any:
        if "device" not in node.kwargs:
            return evaluate(self, node)
        with patch.object(node, "_kwargs", {**node.kwargs, "device": torch.device("cpu")}):
            return evaluate(self, node)

    UniformValueConstantFolder._deduce_value = evaluate_on_cpu
    triton_helpers.set_driver_to_gpu = returning(None)
    triton.runtime.driver.set_active(
        SimpleNamespace(  # type: ignore[arg-type]
            get_current_target=returning(GPUTarget("cuda", gpu.capability, 32)),
            get_active_torch_device=returning(torch.device("cuda:0")),
            get_current_device=returning(0),
            get_device_interface=returning(torch.cuda),
            is_active=returning(True),
            utils=SimpleNamespace(
                get_device_properties=returning(
                    {
                        "max_shared_mem": properties.shared_memory_per_block_optin,
                        "multiprocessor_count": gpu.multiprocessors,
                        "max_num_regs": 65536,
                        "warpSize": 32,
                    }
                )
            ),
        )
    )


class Recorder:
    """Replaces a kernel of Inductor: compiles it with every configuration, and records its launches."""

    def __init__(self, name: str, source: str, captured: Captured) -> None:
        from torch._inductor.codecache import PyCodeCache

        self.kernel: Any = getattr(PyCodeCache.load(source), name)
        if name in captured.kernels and captured.kernels[name].source != source:
            name += "_backward"  # the backward's kernels are numbered from 0 again
        self.name, self.captured = name, captured
        if name not in captured.kernels:
            captured.kernels[name] = Kernel(source, self.kernel.triton_meta["signature"], self.candidates())

    def candidates(self) -> list[Candidate]:
        from benchmarks.speed_model.simulate import read_code

        kernel = self.kernel
        kernel._make_launchers = returning(None)  # they would load the machine code onto the GPU
        kernel._precompile_worker()
        for result in kernel.compile_results:
            if "R0_BLOCK" in result.config.kwargs:  # Inductor tries half of it, depending on the registers
                result.kernel.n_regs = read_code(result.kernel.asm["cubin"], 1, 0).registers
        kernel._dynamic_scale_rblock()
        results = [(result.config, result.kernel) for result in kernel.compile_results]
        return [
            Candidate(config.kwargs, config.num_warps, compiled.metadata.shared, compiled.asm["cubin"])
            for config, compiled in results
        ]

    def run(self, *args: Any, stream: int) -> None:
        import torch

        named = dict(zip(self.captured.kernels[self.name].signature, args, strict=False))
        tensors = {n: (a.numel(), a.itemsize) for n, a in named.items() if isinstance(a, torch.Tensor)}
        sizes = {n: a for n, a in named.items() if isinstance(a, int)}
        self.captured.launches.append(Launch(self.name, tensors, sizes))


def make_network(network: str) -> Any:
    """Return torchvision's ResNet-18 with the 3x3 stem for "resnet18", else a tiny network with one batch norm."""
    from torch import nn

    from benchmarks.networks import eager_resnet18

    if network == "resnet18":
        return eager_resnet18()
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), *head)


def fake_step(
    batch_size: int, dtype: str, network: str, wrap: Callable[[Any], Any], observer: AbstractContextManager
) -> None:
    """Run a forward and backward pass of `wrap(model)` on fake tensors, under autocast, channels_last."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = make_network(network).to(memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty_strided(parameter.shape, parameter.stride(), device="cuda")
                setattr(module, name, torch.nn.Parameter(fake))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
        images = torch.empty(batch_size, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(batch_size, dtype=torch.long, device="cuda")
        with observer:
            with torch.autocast("cuda", dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]):
                loss = torch.nn.functional.cross_entropy(wrap(model)(images), labels)
            loss.backward()


def capture(batch_size: int, dtype: str, network: str) -> Captured:
    """Return the kernels and launches of the compiled network."""
    import torch
    from torch._C._dynamo import guards
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.select_algorithm import extern_kernels

    captured = Captured({}, [])
    config.compile_threads = 1
    config.force_disable_caches = True
    config.shape_padding = False  # it times matrix products
    config.use_static_cuda_launcher = False  # it keeps no machine code
    AsyncCompile.triton = lambda self, name, source, device_str="cuda": Recorder(name, source, captured)  # type: ignore
    cast(Any, guards)._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    for name in ("mm", "addmm"):  # cuBLAS
        object.__setattr__(extern_kernels, name, lambda *args, out, **kwargs: out)
    compiled = partial(torch.compile, dynamic=False, fullgraph=True)
    fake_step(batch_size, dtype, network, compiled, nullcontext())
    return captured


def count_operations(batch_size: int, dtype: str, network: str) -> Counter[str]:
    """Return how often eager dispatches each operator to CUDA."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[str(func)] += 1
            return func(*args, **(kwargs or {}))

    fake_step(batch_size, dtype, network, lambda model: model, Count())
    return counts


def main(function: str, gpu: str, batch_size: str, dtype: str, network: str, path: str) -> None:
    """Call `function` and write its result as a pickle."""
    pretend_gpu(GPUS[gpu])
    result = {"capture": capture, "count_operations": count_operations}[function](int(batch_size), dtype, network)
    Path(path).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    load_before_torch(sys.argv[1])
    # Import this file under its own name, by which its classes are pickled.
    from benchmarks.speed_model import capture as module

    module.main(*sys.argv[2:])

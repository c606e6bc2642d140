"""Predict the kernels of torch.compile for a training step of ResNet-18, 3x3 stem, autocast, channels_last.

Inductor generates the kernels for the GPU. They are compiled with every configuration that Inductor would time; the one
with the fastest prediction counts. Shapes are static, and the mode is the default.
"""

import importlib.util
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths

from benchmarks.results import ROOT

from .capture import Candidate, Captured, Kernel, Launch
from .gpus import Gpu
from .launches import parameter_offsets
from .rows import Row
from .simulate import Work, predict, read_code


def build_fake_cuda(folder: Path) -> Path:
    """Compile fake_cuda.cpp; return the library.

    Raises:
        RuntimeError: a C++ compiler or Triton's backend for NVIDIA is missing, or torch is built for GPUs.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("capturing torch.compile's kernels needs a C++ compiler: install g++ or set CXX")
    if not importlib.util.find_spec("triton") or not importlib.util.find_spec("triton.backends.nvidia"):
        raise RuntimeError("capturing torch.compile's kernels needs Triton with its NVIDIA backend: pip install triton")
    if torch.backends.cuda.is_built():
        raise RuntimeError(f"capturing torch.compile's kernels needs a CPU build of torch, got {torch.__version__}")
    library = folder / "fake_cuda.so"
    includes = [f"-I{path}" for path in include_paths()]
    source = Path(__file__).with_name("fake_cuda.cpp")
    # -w suppresses the many warnings of torch's headers.
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-std=c++20", source, "-o", library, *includes], check=True)
    return library


def run_capture(function: str, gpu: str, batch_size: int, dtype: str, network: str = "resnet18") -> Any:
    """Run a function of capture.py, given by name, in a separate process with a patched torch; return its result.

    Raises:
        RuntimeError: a requirement is missing, or torch's internals have changed.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "captured.pickle"
        library = build_fake_cuda(Path(folder))
        command = [sys.executable, "-m", "benchmarks.speed_model.capture", library, function]
        command += [gpu, str(batch_size), dtype, network, path]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_INTERPRET": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"torch {torch.__version__} cannot pretend that a GPU exists:\n{done.stderr[-2000:]}")
        return pickle.loads(path.read_bytes())


def group_of(launch: Launch) -> str:
    """Return the launch's group, one of `rows.GROUPS`, from the operations in the kernel's name."""
    if re.search("batch_norm|relu|threshold", launch.kernel):
        return "batch norm"
    if all(tensor == (1, 8) for tensor in launch.tensors.values()):  # int64
        return "counter"
    return "cast" if "fused__to_copy" in launch.kernel and "sum" not in launch.kernel else "rest"


def work_of(launch: Launch, kernel: Kernel, blocks: dict[str, int], gpu: Gpu) -> Work:
    """Return the work of a launch with these block sizes; images are the tensors with an element per index."""
    sizes, offsets = launch.sizes, parameter_offsets(kernel.signature, gpu.capability)
    n_reduced = sizes.get("r0_numel", 1)
    n_elements = sizes["xnumel"] * sizes.get("ynumel", 1) * n_reduced
    images = {name: item_size for name, (elements, item_size) in launch.tensors.items() if elements == n_elements}
    # A tensor updated in place counts twice if the kernel also reads it.
    accesses = {name: 1 + ("in_out" in name and f"tl.load({name} " in kernel.source) for name in images}
    x_block = blocks.get("XBLOCK", 1)
    return Work(
        grid=math.ceil(sizes["xnumel"] / x_block) * math.ceil(sizes.get("ynumel", 1) / blocks.get("YBLOCK", 1)),
        image_parameters=frozenset(offsets[name] for name in images),
        image_bytes=float(n_elements * sum(accesses[name] * item_size for name, item_size in images.items())),
        program_reads={
            offsets[name]: float(x_block * n_reduced * item_size)
            for name, item_size in images.items()
            if name.startswith("in_") and "R0_BLOCK" in blocks
        },
    )


def predict_candidate(launch: Launch, kernel: Kernel, candidate: Candidate, gpu: Gpu) -> tuple[float, float]:
    """Return the predicted microseconds without the launch, and the bytes."""
    work = work_of(launch, kernel, candidate.blocks, gpu)
    code = read_code(candidate.cubin, candidate.warps, candidate.shared)
    largest = max(elements * item_size for elements, item_size in launch.tensors.values())
    return predict(code, work, gpu, gpu.holds(largest)).us, work.image_bytes


def predict_kernel(launch: Launch, kernel: Kernel, gpu: Gpu) -> tuple[float, float]:
    """Return the same for the fastest candidate whose machine code the model can follow.

    Raises:
        ValueError: the model can follow none.
    """
    predictions, errors = [], []
    for candidate in kernel.candidates:
        try:
            predictions.append(predict_candidate(launch, kernel, candidate, gpu))
        except ValueError as error:
            errors.append(error)
    if not predictions:
        raise errors[0]
    return min(predictions)


def compile_rows(captured: Captured, gpu: Gpu) -> list[Row]:
    """Return a row for each kernel, in the order of first launches."""
    counts = Counter(launch.kernel for launch in captured.launches)
    rows = []
    for launch in {launch.kernel: launch for launch in captured.launches}.values():
        kernel = captured.kernels[launch.kernel]
        us, n_bytes = predict_kernel(launch, kernel, gpu)
        name = launch.kernel.removeprefix("triton_")
        rows.append(Row("compile", group_of(launch), name, counts[launch.kernel], us, n_bytes))
    return rows

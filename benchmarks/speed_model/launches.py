"""Record the kernels that a fused operation launches, on tensors of the meta device, and compile them for any GPU."""

import ast
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fast.ops import BatchNormArgs, launch
from resnet_fast.ops.arguments import Saved, arguments_of

from .gpus import ARCHITECTURES, Gpu
from .simulate import Code, Work, read_code

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
POINTERS = {dtype: f"*{name}" for name, dtype in DTYPES.items()} | {torch.uint8: "*u8", torch.int32: "*i32"}


class Launch(NamedTuple):
    """A launch: the kernel, its arguments, and the grid."""

    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]

    def signature(self, target: GPUTarget) -> tuple[dict, dict, dict]:
        """Return the arguments' types, constants and attributes, as Triton's launcher specializes them."""
        backend: Any = make_backend(target)
        types, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                types[parameter.name] = "constexpr"
                constants[(position,)] = value
                continue
            specialization = ""
            if isinstance(value, TensorDescriptor):
                element = POINTERS[value.base.dtype].removeprefix("*")
                types[parameter.name] = f"tensordesc<{element}{list(value.block_shape)}>"
            elif isinstance(value, torch.Tensor):
                types[parameter.name] = POINTERS[value.dtype]
                specialization = backend.get_tensor_specialization(value, align=True)
            elif parameter.annotation_type:
                types[parameter.name] = parameter.annotation_type
            else:
                types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                specialization = backend.get_int_specialization(value, align=True)
            if specialization:
                attributes[(position,)] = backend.parse_attr(specialization)
        return types, constants, attributes

    def options(self, target: GPUTarget) -> dict[str, int]:
        return launch.compiler_options(self.arguments, int(target.arch) if target.backend == "cuda" else None)

    def images(self) -> dict[str, torch.Tensor]:
        """Return the tensors that the launch reads or writes tile by tile, including ReLU's bits."""
        if "TILE" not in self.arguments:  # a few rows at most
            return {}
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}
        return {name: value for name, value in tensors.items() if value.dim() == 4 or value.dtype == torch.uint8}


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of executing them."""
    launches: list[Launch] = []
    original = launch.launch_kernel

    def record(kernel: Any, grid: tuple, options: dict[str, Any] | None = None, /, **arguments: Any) -> None:
        launches.append(Launch(kernel, arguments, grid))

    launch.launch_kernel = record
    try:
        yield launches
    finally:
        launch.launch_kernel = original


@cache
def training_launches(
    dtype: str, batch_size: int, n_channels: int, width: int, join: str, fork: bool
) -> dict[str, list[Launch]]:
    """Return the launches of a fused operation with ReLU, channels_last, by direction: "forward" and "backward"."""
    x = torch.empty(batch_size, n_channels, width, width, dtype=DTYPES[dtype], device="meta")
    x = x.to(memory_format=torch.channels_last)
    vector = torch.empty(n_channels, device="meta")
    norm = BatchNormArgs(vector, vector, vector, vector, training=True)
    residual = None if join == "none" else x
    inputs, settings = arguments_of(x, norm, residual, norm if join == "bn" else None)
    with recorded_launches() as forward:
        outputs = launch.forward(inputs, settings)
    y, saved = outputs.y, Saved.of(inputs, settings, outputs)
    with recorded_launches() as backward:
        launch.backward(y, y if fork else None, saved, settings)
    return {"forward": forward, "backward": backward}


def parameter_offsets(types: dict[str, str], capability: int) -> dict[str, int]:
    """Return each parameter's offset in the constant bank, in bytes; constants have none."""
    at, offsets = ARCHITECTURES[capability].parameters, {}
    for name, kind in types.items():
        if kind != "constexpr":
            size = 8 if kind.startswith("*") or kind in ("i64", "u64", "fp64") else 4
            at = -(-at // size) * size
            offsets[name] = at
            at += size
    return offsets


def dump(node: Any) -> str:
    """Return ast.dump(node) as in Python 3.11, so that keys do not depend on the version of Python.

    Later versions leave out empty lists and add type parameters.
    """
    if isinstance(node, list):
        return f"[{', '.join(map(dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name in node._fields:
        value = getattr(node, name)
        is_left_out = value is None and getattr(type(node), name, ...) is None
        if not is_left_out and (name != "type_params" or value):
            fields.append(f"{name}={dump(value)}")
    return f"{type(node).__name__}({', '.join(fields)})"


@cache
def source_of(kernel: triton.JITFunction) -> str:
    """Return the code of a kernel and of every function it calls, without comments, docstrings and line numbers."""
    parts, todo = {}, [kernel]
    while todo:
        function = todo.pop()
        body: Any = ast.parse(function.src).body[0]
        if ast.get_docstring(body) is not None:
            del body.body[0]
        parts[function.__name__] = dump(body)
        for name in function.fn.__code__.co_names:
            value = function.fn.__globals__.get(name)
            if isinstance(value, triton.JITFunction) and value.__name__ not in parts:
                todo.append(value)
            elif isinstance(value, tl.constexpr):
                parts[name] = repr(value.value)
    return repr(sorted(parts.items()))


def compile_launch(recorded: Launch, gpu: Gpu) -> Code:
    """Return the machine code of a launch on a GPU."""
    target = GPUTarget("cuda", gpu.capability, 32)
    types, constants, attributes = recorded.signature(target)
    options = recorded.options(target)
    return _compile(recorded.kernel, gpu.capability, _Arguments((types, constants, attributes, options)))


class _Arguments:
    """The arguments and options of a compilation, hashed by their repr."""

    def __init__(self, parts: tuple[dict, dict, dict, dict]) -> None:
        self.parts = parts

    def __hash__(self) -> int:
        return hash(repr(self.parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Arguments) and self.parts == other.parts


@cache
def _compile(kernel: triton.JITFunction, capability: int, arguments: _Arguments) -> Code:
    types, constants, attributes, options = arguments.parts
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return read_code(compiled.asm["cubin"], options["num_warps"], compiled.metadata.shared)


def work_of(recorded: Launch, gpu: Gpu) -> Work:
    """Return the work of a launch: images are accessed once, partial results by each program of their channels."""
    types, _, _ = recorded.signature(GPUTarget("cuda", gpu.capability, 32))
    offsets = parameter_offsets(types, gpu.capability)
    images = recorded.images()
    grid = math.prod(recorded.grid)
    reads = {offsets[name]: image.nbytes / grid for name, image in images.items()}
    for name, value in recorded.arguments.items():
        # Only partial results that a kernel merges, not those that it writes.
        if isinstance(value, torch.Tensor) and name.endswith("partials_ptr") and "BLOCK_S" in recorded.arguments:
            tile = recorded.arguments.get("TILE")
            block_c = tile.block_c.value if tile else recorded.arguments["BLOCK_C"]
            n_channels = tile.n_channels.value if tile else recorded.arguments["N_CHANNELS"]
            # The first row of the forward's partial results is the pivot: one row, because there is one group.
            splits = value if "gradient" in recorded.kernel.__name__ else value[1:]
            reads[offsets[name]] = splits.nbytes * min(1.0, block_c / n_channels)
    image_bytes = float(sum(image.nbytes for image in images.values()))
    return Work(grid, frozenset(offsets[name] for name in images), image_bytes, reads)


def key_of(recorded: Launch, gpu: Gpu) -> str:
    """Return a hash of the kernel, its arguments, the GPU and the model; equal keys have equal predictions."""
    target = GPUTarget("cuda", gpu.capability, 32)
    parts = (
        triton.__version__, gpu, recorded.grid, source_of(recorded.kernel), recorded.signature(target),
        recorded.options(target), work_of(recorded, gpu), _model_source(),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@cache
def _model_source() -> str:
    """Return the model's code, without comments and docstrings."""
    parts = []
    for name in ("sass.py", "path.py", "simulate.py"):
        tree = ast.parse(Path(__file__).with_name(name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        parts.append(dump(tree))
    return "".join(parts)

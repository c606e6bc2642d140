"""Compiles the kernels for GPUs that need not exist here. Run without TRITON_INTERPRET.

What is compiled is what ResNets launch: launches are recorded from the launching code on tensors of the meta device, so
that the arguments' types, divisibility and block sizes are those of a real run.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from machine_code import MachineCode, loads_in_flight, read_amdgcn, read_cubin
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.speed_model.gpus import ARCHITECTURES
from benchmarks.speed_model.launches import DTYPES, Launch, parameter_offsets, recorded_launches, source_of
from benchmarks.speed_model.sass import read_code
from resnet_fast.ops import BatchNormArgs, launch
from resnet_fast.ops.arguments import Saved, arguments_of

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (75, 80, 86, 89, 90, 100, 120)} | {
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
BACKENDS = {target.backend: target for target in TARGETS.values()}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
STAGES = {64: 32, 128: 16, 256: 8, 512: 4}  # ResNet-18 with the 3x3 stem on 32x32 images: channels to map width
# Of other types and layouts than the most taken: partial results that combine kernels merge, and that second passes do.
TWO_STAGES = {128: 16, 512: 4}
MOST_TAKEN = ("bf16", "channels_last")
BATCH = 128
# The image-shaped arguments that a kernel writes; it reads the others.
WRITTEN = {
    "statistics_kernel": set(),
    "combine_statistics_kernel": set(),
    "normalize_kernel": {"y_ptr"},
    "reduce_kernel": {"dz_ptr"},
    "combine_gradients_kernel": set(),
    "input_gradients_kernel": {"dx_ptr", "dresidual_ptr"},
}


class Operation(NamedTuple):
    """One fused operation: forward and backward with batch statistics, or the forward with tracked ones."""

    dtype: str
    layout: str
    n_channels: int
    width: int
    join: str = "none"
    relu: bool = True
    fork: bool = False
    training: bool = True
    ghost: int = 0  # images per ghost batch


# All operations are compiled for sm_90, those of the path most taken for these, fp16 for sm_75, and two for all.
AMPERE_ON = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
ONE_OF_ALL = (Operation("", "", 128, 16)[2:], Operation("", "", 128, 16, "bn", fork=True)[2:])


def count_images(recorded: Launch) -> tuple[int, int]:
    """How many image-shaped tensors a launch reads and writes."""
    tensors = {name: value for name, value in recorded.arguments.items() if isinstance(value, torch.Tensor)}
    images = {name for name, value in tensors.items() if value.dim() == 4}
    written = images & WRITTEN[recorded.kernel.__name__]
    return len(images - written), len(written)


class Compiled(NamedTuple):
    """One row of the table: a kernel, the first operation that launches it like this, and its machine code.

    `dots` are the matrix products that the source asks for. Of each image-shaped tensor a thread has `n_tiles` tiles at
    once, of `share` bits. `bases` and `offsets` are the types of the offsets to pointers of the data type, to a tile's
    first element and inside the tile. `in_flight`: loads of images that a thread has on their way at once, where the
    code is NVIDIA's and its parameters are known. `key` is equal where the code is: it stands for what is compiled, and
    by what.
    """

    kernel: str
    operation: Operation
    target: str
    code: MachineCode
    shared: int
    dots: int
    images_read: int
    images_written: int
    n_tiles: int
    share: int
    in_flight: int | None
    bases: str
    offsets: str
    key: str


def operations() -> Iterator[Operation]:
    """Those of ResNet-18 on 32x32 images: in a block, at its end, behind a projection; in training and evaluation.

    Every kind is there for the path most taken; for the others those whose code differs most.
    """
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        is_most_taken = (dtype, layout) == MOST_TAKEN
        for n_channels, width in (STAGES if is_most_taken else TWO_STAGES).items():
            at = Operation(dtype, layout, n_channels, width)
            joins = ("none", "add", "bn") if n_channels > 64 else ("none", "add")
            for join in joins:
                yield at._replace(join=join, fork=join != "none")
                yield at._replace(join=join, training=False)
        yield Operation(dtype, layout, 64, 32, fork=True)  # the stem: no residual, two consumers
        yield Operation(dtype, layout, 64, 32, relu=False)  # FusedBatchNorm2d in place of nn.BatchNorm2d
        yield Operation(dtype, layout, 128, 16, "bn", fork=True, ghost=32)  # ghost batches
        yield Operation(dtype, layout, 24, 7, "bn", fork=True, ghost=31)  # of rows that are a multiple of nothing
        if is_most_taken:
            yield Operation(dtype, layout, 512, 4, "add")  # the last block: one consumer
            yield Operation(dtype, layout, 24, 32)  # channels that are a multiple of 8 alone
            yield Operation(dtype, layout, 128, 16, ghost=32)
            yield Operation(dtype, layout, 128, 16, "add", fork=True, ghost=32)


@cache
def record_launches(operation: Operation) -> list[Launch]:
    dtype, layout, n_channels, width, join, relu, fork, training, ghost = operation
    with recorded_launches() as recorded:
        x = torch.empty(BATCH, n_channels, width, width, dtype=DTYPES[dtype], device="meta")
        x = x.to(memory_format=LAYOUTS[layout])
        vector = torch.empty(n_channels, dtype=torch.float64 if dtype == "fp64" else torch.float32, device="meta")
        norm = BatchNormArgs(vector, vector, vector, vector, training)
        residual = None if join == "none" else x
        residual_norm = norm if join == "bn" else None
        inputs, settings = arguments_of(x, norm, residual, residual_norm, relu, ghost)
        outputs = launch.forward(inputs, settings)
        if training:
            y, saved = outputs.y, Saved.of(inputs, settings, outputs)
            launch.backward(y, y if fork else None, saved, settings)
            var = torch.empty(n_channels, dtype=torch.float64, device="meta")
            launch.moments(x, var)  # of several processes
    return recorded


class Job(NamedTuple):
    """One launch of an operation, to be compiled for a target."""

    operation: Operation
    index: int
    target: str
    key: str

    def compile(self) -> Compiled:
        recorded, target = record_launches(self.operation)[self.index], TARGETS[self.target]
        types, constants, attributes = recorded.signature(target)
        source = ASTSource(fn=recorded.kernel, signature=types, constexprs=constants, attrs=attributes)
        compiled, code = compile_for(source, target, recorded.options(target))
        ttir = compiled.asm["ttir"]
        image = {"bf16": "bf16", "fp16": "f16", "fp32": "f32", "fp64": "f64"}[self.operation.dtype]
        threads = recorded.options(target)["num_warps"] * target.warp_size
        tile = recorded.arguments.get("TILE")
        elements = tile.block_m.value * tile.block_c.value // threads if tile else 0
        images_read, images_written = count_images(recorded)

        def offset_types(pattern: str) -> str:
            return " ".join(sorted(set(re.findall(pattern, ttir))))

        return Compiled(
            kernel=recorded.kernel.__name__,
            operation=self.operation,
            target=self.target,
            code=code,
            shared=compiled.metadata.shared,
            dots=ttir.count("tt.dot "),
            images_read=images_read,
            images_written=images_written,
            n_tiles=tile.n_tiles.value if tile else 0,
            share=elements * DTYPES[self.operation.dtype].itemsize * 8,
            in_flight=count_in_flight(recorded, target, compiled.asm.get("cubin")),
            # The pairs of partial results, of which there are few, have the type of fp32 images.
            bases=offset_types(rf"addptr (?!%\w*partials_ptr).* : !tt\.ptr<{image}>, (i\d+)"),
            offsets=offset_types(rf"addptr.*!tt\.ptr<{image}>>, tensor<\w+x(i\d+)>"),
            key=self.key,
        )


def count_in_flight(recorded: Launch, target: GPUTarget, cubin: bytes | None) -> int | None:
    if target.backend != "cuda" or target.arch not in ARCHITECTURES:
        return None
    parameters = parameter_offsets(recorded.signature(target)[0], target.arch)
    images = [parameters[name] for name, image in recorded.images().items() if image.dim() == 4]
    return loads_in_flight(read_code(cubin, recorded.options(target)["num_warps"], 0).instructions, images)


def compile_for(source: ASTSource, target: GPUTarget, options: dict[str, int]) -> tuple[Any, MachineCode]:
    compiled = triton.compile(source, target=target, options=options)
    read = read_cubin if target.backend == "cuda" else read_amdgcn
    return compiled, read(compiled.asm["cubin" if target.backend == "cuda" else "amdgcn"])


def jobs() -> list[Job]:
    """Every distinct machine code once."""
    found: dict[str, Job] = {}
    for operation in operations():
        for index, recorded in enumerate(record_launches(operation)):
            of_backend = {
                backend: (recorded.signature(target), recorded.options(target)) for backend, target in BACKENDS.items()
            }
            is_most_taken = (operation.dtype, operation.layout) == MOST_TAKEN
            for name, target in TARGETS.items():
                is_full = name == "sm_90" or (is_most_taken and name in AMPERE_ON)
                if not is_full and (name, operation.dtype) != ("sm_75", "fp16") and operation[2:] not in ONE_OF_ALL:
                    continue
                parts = (triton.__version__, name, source_of(recorded.kernel), of_backend[target.backend])
                key = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
                found.setdefault(key, Job(operation, index, name, key))
    return list(found.values())


def compile_all(jobs: Iterable[Job]) -> Iterator[Compiled]:
    """In parallel over the cores."""
    with ProcessPoolExecutor() as pool:
        yield from pool.map(Job.compile, jobs, chunksize=4)

"""Launches kernels on the stub driver, which raises where it refuses one; prints what was launched, as JSON.

python tests/stub_step.py 90 step bf16 128 512      # a training step of ResNet-18, by Triton, then by plans
python tests/stub_step.py 90 chosen bf16 128        # what `resnet-fast tune` may choose: convolutions, single read
python tests/stub_step.py 90 training bf16          # the training command's steps, by every recipe
python tests/stub_step.py 90 doctor                 # the self-check
python tests/stub_step.py 90 predictions            # benchmarks/first_predictions.py: the registers of each kernel
python tests/stub_step.py 90 plans                  # operations by Triton and by plans, with the same parameters
python tests/stub_step.py 90 refused                # what no GPU takes
"""

import functools
import itertools
import json
import sys
from collections import Counter
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import stub_driver
from benchmarks.stub_driver import Launch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
N_IMAGES = 8  # that batches are drawn from


def image(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    n_images, n_channels, height, width = shape
    return torch.empty(n_images, height, width, n_channels, dtype=dtype).permute(0, 3, 1, 2)


def batch_of(n_images: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By the kernel that augments, with all that a recipe may ask for."""
    from resnet_fast.ops.augment import N_DRAWS, augment

    images = torch.zeros(N_IMAGES, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    plan, labels = torch.zeros(n_images, N_DRAWS, dtype=torch.int32), torch.zeros(N_IMAGES, dtype=torch.int64)
    augment(images, labels, plan, (0.5,) * 3, (0.5,) * 3, padding=4, reflect=True, cutout=8, dtype=dtype)
    return augment(images, labels, plan, (0.5,) * 3, (0.5,) * 3, dtype=dtype)


def write_labels() -> None:
    """Have all labels be 0: what the kernel would write could be any number, and a loss refuses most."""
    from resnet_fast.ops import augment_launch

    launch = augment_launch.augment

    def augment(*arguments: Any) -> tuple[Tensor, Tensor]:
        images, labels = launch(*arguments)
        return images, labels.zero_()

    augment_launch.augment = augment


def training_step(network: torch.nn.Module, dtype: torch.dtype, n_images: int) -> None:
    images, labels = batch_of(n_images, dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):  # of the linear layer
        loss = F.cross_entropy(network.train()(images), labels)
        with torch.no_grad():
            network.eval()(images)
    loss.backward()


def step(precision: str, *batch_sizes: str) -> dict[str, int]:
    """Two training steps and evaluations: in the first plans are recorded, by which the second launches."""
    from benchmarks.host_cost import without_convolutions
    from resnet_fast import resnet18

    network = without_convolutions(resnet18(num_classes=10, stem="cifar"))
    found: Counter[str] = Counter()
    for batch_size in map(int, batch_sizes):
        steps = []
        for _ in range(2):
            with stub_driver.recorded() as launches:
                training_step(network, DTYPES[precision], batch_size)
            steps.append(list(map(without_addresses, launches)))
        assert steps[0] == steps[1], "plans launch as Triton does"
        found.update(launch.kernel for launch in launches)
    return found


def without_addresses(launch: Launch) -> Launch:
    """None for a null pointer, else 1."""
    values = tuple(value and 1 if isinstance(value, int) else value for value in launch.parameters)
    return launch._replace(parameters=values)


def chosen(precision: str, batch_size: str) -> dict[str, int]:
    """Every implementation that `resnet-fast tune` would time for ResNet-18, once; cuDNN's apart."""
    from resnet_fast.ops.implementations import CUDNN
    from resnet_fast.tuning import candidates, find_problems, inputs

    replaced = {f"exact_{name}": lambda *tensors: ({}, {}) for name in ("convolution", "batch_norm_backward")}
    replaced |= {f"exact_{name}": lambda *tensors: {} for name in ("batch_norm", "data_gradient")}
    found: Counter[str] = Counter()
    with mock.patch.multiple(candidates, **replaced), mock.patch.object(inputs, "rotation", lambda size, device: 1):
        for problem in find_problems("resnet18", "cifar", [int(batch_size)], 32, precision):
            prepared = candidates.candidates(problem, torch.device("cpu"))
            for choice, candidate in prepared.candidates.items():
                if choice.implementation != CUDNN:
                    with stub_driver.recorded() as launches:
                        candidate.run()
                    found.update(launch.kernel for launch in launches)
    return found


def plans(*options: str) -> dict[str, int]:
    """Operations launched by Triton, whose parameters a plan's launches have, addresses of inputs included.

    With "--wrong" the plan changes every integer.
    """
    from triton.runtime.jit import JITFunction

    from resnet_fast.ops import plan

    if options == ("--wrong",):
        plan.repr = lambda value: str(value + 1) if type(value) is int else str(value)
    found: Counter[str] = Counter()
    cases = itertools.product(("none", "add", "bn"), (False, True), ((2, 64, 2, 2), (128, 64, 32, 32)))
    for join, fork, shape in cases:  # the larger one has kernels that combine partial results
        run = functools.partial(launches_of, operation(join, fork, shape))
        by_triton = run()
        with mock.patch.object(JITFunction, "run", None):  # which plans do without
            by_plan = run()
        assert by_plan == by_triton, f"{join}, {fork}, {shape}: {by_plan} instead of {by_triton}"
        found.update(launch.kernel for launch in by_plan)
    return found


def doctor() -> dict[str, int]:
    """The self-check, whose results are wrong."""
    from resnet_fast.doctor import parity

    limits = {"SECONDS_FOR_CASES": 1e9, "SECONDS_BEFORE_STEP": 1e9}
    with mock.patch.multiple(parity, **limits), stub_driver.recorded() as launches:
        assert len(parity.self_check(torch.device("cpu"), torch.bfloat16)) == parity.N_CHECKS
    return Counter(launch.kernel for launch in launches)


def training(precision: str) -> dict[str, int]:
    """Steps of the training command, of a small network, batches that are not full among them."""
    from thin_resnet import thin_resnet

    from resnet_fast.data import Augmentation, Loader, TensorSplit
    from resnet_fast.models import resnet
    from resnet_fast.training import RECIPES, TrainingStep

    split = TensorSplit(torch.zeros(20, 3, 16, 16, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64))
    augmentation = Augmentation((0.5,) * 3, (0.5,) * 3, crop=2, padding="reflect", flip="random", cutout=4)
    found: Counter[str] = Counter()
    for recipe in RECIPES.values():
        step = TrainingStep(thin_resnet(resnet).train(), recipe, augmentation, n_steps=3, precision=precision)
        with stub_driver.recorded() as launches:
            for batch in Loader(split, augmentation, 8).epoch(1):
                step(batch)
        found.update(launch.kernel for launch in launches)
    return found


def predictions() -> dict[str, int]:
    """What benchmarks/first_predictions.py times, cuDNN's apart."""
    from benchmarks import first_predictions

    shape = (2, 64, 32, 32)
    generator = torch.Generator().manual_seed(0)
    inputs = first_predictions.make_inputs(shape[0], torch.device("cpu"), generator)
    big = [image((first_predictions.BATCH, *shape[1:]), torch.bfloat16) for _ in range(3)]
    inputs = inputs._replace(x=big[0], dy=big[1], y=big[2], saved=inputs.saved._replace(x=big[0]))
    registers = {}
    for (kernel, variant), case in first_predictions.cases():
        if kernel in first_predictions.REDUCTIONS:
            with stub_driver.recorded() as launches:
                case.run(inputs)
            assert [launch.kernel for launch in launches] == [kernel]
            registers[f"{kernel}, {variant}"] = launches[0].registers
    return registers


class Operation(NamedTuple):
    """A fused operation: BN, the residual joined, ReLU."""

    norms: list[Any]
    join: str
    fork: bool
    images: list[Tensor]


def operation(join: str, fork: bool, shape: tuple[int, ...]) -> Operation:
    from resnet_fast import FusedBatchNorm2d

    images = [image(shape, torch.bfloat16) for _ in range(4)]
    for differentiable in images[:2]:
        differentiable.requires_grad_()
    return Operation([FusedBatchNorm2d(shape[1]) for _ in range(2)], join, fork, images)


def launches_of(operation: Operation) -> list[Launch]:
    """Those of the forward, then of the backward."""
    norms, join, fork, (x, residual, dy, dy_alias) = operation
    given = {"none": (), "add": (residual,), "bn": (residual, norms[1])}[join]
    known: dict[int, Any] = {tensor.data_ptr(): f"image {place}" for place, tensor in enumerate(operation.images)}
    vectors = [tensor for norm in norms for tensor in (*norm.parameters(), norm.running_mean, norm.running_var)]
    known |= {tensor.data_ptr(): f"vector {place}" for place, tensor in enumerate(vectors)}
    with stub_driver.recorded() as forward:
        y = norms[0].fused(x, *given, relu=True, fork=fork)
    with stub_driver.recorded() as backward:
        torch.autograd.backward(y if fork else [y], [dy, dy_alias] if fork else [dy])
    return [launch for launches in (forward, backward) for launch in with_known_addresses(launches, known)]


def with_known_addresses(launches: list[Launch], known: dict[int, Any]) -> list[Launch]:
    """Other addresses, of results and buffers, by the order in which they come: the same buffer has the same name."""
    names = dict(known)

    def named(value: int | bytes) -> Any:
        if isinstance(value, bytes) or value == 0:
            return value
        return names.setdefault(value, f"buffer {len(names) - len(known)}")

    return [launch._replace(parameters=tuple(map(named, launch.parameters))) for launch in launches]


def refused() -> dict[str, str]:
    """What the driver says to launches, machine code and tensor maps that no GPU of 9.0 takes."""
    from triton.runtime import driver

    from resnet_fast.kernels.conv_tiles import ConvTiles
    from resnet_fast.ops import BatchNormArgs, conv3x3, launch, plan
    from resnet_fast.ops.arguments import arguments_of

    x, weight = image((128, 64, 32, 32), torch.bfloat16), image((64, 64, 3, 3), torch.bfloat16)
    with plan.recorded() as launches:
        launch.forward(*arguments_of(x, BatchNormArgs(None, None, training=True)))
    kernel, _, arguments, compiled = launches[0]
    values = [arguments[name] for name in kernel.arg_names]
    utils: Any = driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor  # triton 3.7, 3.6
    n_warps, n_ctas, shared, *rest = compiled.packed_metadata

    def run(grid=(1, 1, 1), warps=n_warps, memory=shared, given=values) -> None:
        metadata = (warps, n_ctas, memory, *rest)
        compiled.run(*grid, 0, compiled.function, metadata, None, None, None, *given)

    def all_at_once() -> None:
        with mock.patch.object(compiled.run, "launch_cooperative_grid", True):
            run((1000, 1, 1))

    def tensor_map(address: int, block: list[int], line: int) -> None:
        fill(address, 0, 2, 9, block, [64, 64], [line, 1], 0)

    other = bytearray(compiled.asm["cubin"])
    other[48:50] = bytes((100, 100))  # e_flags
    cases = {
        "grid": lambda: run((1, 1 << 16, 1)),
        "threads": lambda: run(warps=64),
        "registers": lambda: run(warps=32),
        "other threads": lambda: run(warps=2 * n_warps),
        "shared memory without the attribute": lambda: run(memory=49153),
        "shared memory": lambda: conv3x3.forward(x, weight, ConvTiles(256, 64, 64, 1, 8, 8, 0)),
        "programs that wait for each other": all_at_once,
        "null pointer": lambda: run(given=[0, *values[1:]]),
        "machine code": lambda: utils.load_binary(kernel.__name__, bytes(other), 0, 0),
        "address of a tensor map": lambda: tensor_map(8, [64, 64], 64),
        "block of a tensor map": lambda: tensor_map(16, [512, 64], 64),
        "stride of a tensor map": lambda: tensor_map(16, [64, 64], 60),
    }
    run()  # what is changed in none of these ways is accepted
    tensor_map(16, [64, 64], 64)
    found = {}
    for name, case in cases.items():
        try:
            case()
            found[name] = "accepted"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    capability, mode, *rest = sys.argv[1:]
    stub_driver.put_in_place(int(capability))
    write_labels()
    torch.set_num_threads(1)
    modes = (step, training, chosen, plans, doctor, predictions, refused)
    print(json.dumps({function.__name__: function for function in modes}[mode](*rest)))

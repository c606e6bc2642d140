"""`python -m benchmarks.host_cost` measures the host time of eager and fused operations.

On the stub driver (stub_driver/) Triton's own binder and C launcher run, but no kernel does. Eager is ATen on the CPU,
with tensors so small that their computation hardly counts. In networks a function that computes nothing replaces the
convolutions on both sides. Eager and fused alternate; the ratio is the median of the rounds' ratios.

Writes results/<cpu>/host_cost.csv.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks import stub_driver
from benchmarks.results import RESULTS, device_slug, machine_columns, replace_rows

CPU = torch.device("cpu")
CHANNELS, WIDTH, BATCH = 64, 2, 2  # of an operation
NETWORK_WIDTH = 8


def image(n_channels: int, width: int) -> Tensor:
    return torch.ones(BATCH, n_channels, width, width).contiguous(memory_format=torch.channels_last)


class NoConvolution(torch.autograd.Function):
    """Replaces a 3x3 or 1x1 convolution: returns ones of its shape, because unwritten memory may be denormal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.x, ctx.weight = x.detach(), weight.detach()
        n_images, _, height, width = x.shape
        y = torch.ones(n_images, height // stride, width // stride, len(weight), dtype=x.dtype)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[override]
        return torch.ones_like(ctx.x), torch.ones_like(ctx.weight), None


def without_convolutions(network: nn.Module) -> nn.Module:
    """Replace all convolutions by NoConvolution, with weights of shape [C_out, 1, 1, 1]."""
    nn.Conv2d.forward = lambda self, x: NoConvolution.apply(x, self.weight, self.stride[0])  # type: ignore[method-assign]
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(torch.ones(module.out_channels, 1, 1, 1))
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


Sides = tuple[Callable[[], Any], Callable[[], Any]]  # eager, fused


def operations() -> Iterator[tuple[str, Sides]]:
    """Yield BN + add + ReLU in training mode."""
    from resnet_fast import FusedBatchNorm2d

    x, residual = (image(CHANNELS, WIDTH).requires_grad_() for _ in range(2))
    dy = image(CHANNELS, WIDTH)
    bn, fused_bn = nn.BatchNorm2d(CHANNELS), FusedBatchNorm2d(CHANNELS)

    def eager() -> Tensor:
        y = bn(x)
        y += residual
        return F.relu(y, inplace=True)

    def fused(fork: bool = False) -> Any:
        return fused_bn.fused(x, residual, relu=True, fork=fork)

    def eager_forked() -> None:
        y = eager()
        torch.autograd.backward([y, y], [dy, dy])

    yield "BN+add+ReLU, forward", (eager, fused)
    yield "BN+add+ReLU, forward and backward", (lambda: eager().backward(dy), lambda: fused().backward(dy))
    yield (
        "BN+add+ReLU, forked, forward and backward",
        (eager_forked, lambda: torch.autograd.backward(fused(fork=True), [dy, dy])),
    )


def networks() -> Iterator[tuple[str, Sides]]:
    """Yield ResNet-18 with the 3x3 stem, in training and evaluation."""
    from resnet_fast import resnet18
    from resnet_fast.models.resnet import give_cifar_stem

    # isort: split
    from torchvision.models import resnet18 as torchvision_resnet18

    theirs = torchvision_resnet18(num_classes=10)
    give_cifar_stem(theirs)
    networks = [without_convolutions(network) for network in (theirs, resnet18(num_classes=10, stem="cifar"))]
    x, labels = image(3, NETWORK_WIDTH), torch.zeros(BATCH, dtype=torch.int64)

    def step(network: nn.Module) -> None:
        for parameter in network.parameters():
            parameter.grad = None
        F.cross_entropy(network(x), labels).backward()

    def evaluate(network: nn.Module) -> None:
        with torch.no_grad():
            network(x[:1])

    yield "ResNet-18, training step", tuple(lambda n=n: step(n) for n in networks)  # type: ignore[misc]
    evaluated = [network.eval() for network in networks]
    yield "ResNet-18, evaluation, one image", tuple(lambda n=n: evaluate(n) for n in evaluated)  # type: ignore[misc]


def measure(sides: Sides, rounds: int, calls: int) -> tuple[float, float, float]:
    """Return the medians over the rounds of eager's and fused's microseconds per call, and of fused / eager."""
    for side in sides:
        for _ in range(20):
            side()
    times: list[list[float]] = []
    gc.disable()
    for _ in range(rounds):
        times.append([])
        for side in sides:
            start = time.perf_counter()
            for _ in range(calls):
                side()
            times[-1].append((time.perf_counter() - start) / calls * 1e6)
        gc.collect(0)
    gc.enable()
    eager, fused = zip(*times, strict=True)
    return statistics.median(eager), statistics.median(fused), statistics.median(f / e for e, f in times)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; each times eager and fused.")] = 300,
    results: Annotated[Path, typer.Option(help="Folder to which results are written.")] = RESULTS,
) -> None:
    """Measure the host time of eager and fused operations, without a GPU."""
    torch.set_num_threads(1)
    try:
        stub_driver.put_in_place()
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from None
    rows = []
    print(f"{'host time':44}  eager, us  fused, us  fused / eager")
    for cases, calls in ((operations, 10), (networks, 1)):
        for case, sides in cases():
            eager, fused, ratio = measure(sides, rounds, calls)
            print(f"{case:44}  {eager:9.1f}  {fused:9.1f}  {ratio:13.2f}", flush=True)
            numbers = {"eager_us": f"{eager:.1f}", "fused_us": f"{fused:.1f}", "ratio": f"{ratio:.3f}"}
            rows.append({"case": case, "rounds": str(rounds), **numbers, **machine_columns(CPU)})
    path = results / device_slug(CPU) / "host_cost.csv"
    replace_rows(path, rows, ("case",))
    print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)

"""`python -m benchmarks.first_predictions` measures predictions of the speed model on a GPU, in half a minute.

It times the reductions of batch norm + ReLU at 64x32x32, batch 512, bf16, with registers as launched, unlimited, and
limited to 128: the model predicts that a second resident program makes them faster. It also times cuDNN's 3x3
convolution there, whose speed decides whether our own convolutions pay. Results are checked against fp64 before timing.

Device time: launches are hidden (see timing.alternate). Inputs rotate through more memory than the L2 cache holds.
Writes results/<gpu>/first_predictions.csv. Exit codes: 0 done, 1 a result is wrong, 2 no NVIDIA GPU.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.grad import conv2d_input

from benchmarks.bench_conv import Norm, through
from benchmarks.correctness import Tolerance, WrongProviderError, check, errors
from benchmarks.results import RESULTS, device_slug, machine_columns, no_gpu, replace_rows
from benchmarks.speed_model.gpus import GPUS, Gpu
from resnet_fast.kernels import tiles
from resnet_fast.ops import reference
from resnet_fast.ops.arguments import BatchNormArgs, Saved, arguments_of
from resnet_fast.ops.backend import cudnn_benchmark
from resnet_fast.pairs import library_gradients
from resnet_fast.profiling.check import rounding_of
from resnet_fast.tuning.timing import alternate, percentiles, rotation

CHANNELS, WIDTH, BATCH = 64, 32, 512
N_CHECKED = 16  # images of a convolution
ROUNDS, WARM_UP = 30, 5
# Limits on registers that replace tiles.max_registers.
LIMITS: dict[str, Callable[..., int | None]] = {
    "as launched": tiles.max_registers,
    "no limit": lambda *_: None,
    "at most 128 registers": lambda *_: 128,
}
# TFLOP/s of cuDNN at which our own convolutions pay on an H200; above 400 the model is wrong (benchmarks/README.md).
CUDNN_TFLOPS = (280.0, 390.0)
STATISTICS, REDUCE = "statistics_kernel", "reduce_kernel"
NORM = BatchNormArgs(None, None, training=True)


class Inputs(NamedTuple):
    """x and dy: [N, C, W, W]; relu(bn(x)) and what it saved; weight: [C, C, 3, 3]."""

    x: Tensor
    dy: Tensor
    y: Tensor
    saved: Saved
    weight: Tensor


class Case(NamedTuple):
    """The timed function, a function that returns its results and their exact values, and the rounding allowed."""

    run: Callable[[Inputs], Any]
    results: Callable[[Inputs], tuple[dict[str, Tensor], dict[str, Tensor]]]
    rounding: float


def make_inputs(n_images: int, device: torch.device, generator: torch.Generator) -> Inputs:
    def image() -> Tensor:
        values = torch.randn(n_images, CHANNELS, WIDTH, WIDTH, generator=generator, device=device)
        return values.bfloat16().contiguous(memory_format=torch.channels_last)

    x, weight = 1 + 2 * image(), torch.randn(CHANNELS, CHANNELS, 3, 3, generator=generator, device=device)
    y, saved = through(Norm("none", False), x, x)
    weight = (weight / (3 * CHANNELS**0.5)).bfloat16().contiguous(memory_format=torch.channels_last)
    return Inputs(x, image(), y, saved, weight)


def statistics(inputs: Inputs) -> Any:
    launch = _launch()
    return launch.partial_statistics(inputs.x, launch.Shape.of(inputs.x))


def statistics_results(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    launch = _launch()
    mean, rstd = launch.combine_statistics(statistics(inputs), NORM, launch.Shape.of(inputs.x))
    var, exact = torch.var_mean(inputs.x.double(), reference.PER_CHANNEL, correction=0)
    return {"mean": mean[0], "rstd": rstd[0]}, {"mean": exact, "rstd": (var + NORM.eps).rsqrt()}


def reduce(inputs: Inputs) -> Any:
    launch = _launch()
    return launch.partial_sums(
        inputs.dy, None, inputs.saved, arguments_of(inputs.x, NORM)[1], launch.Shape.of(inputs.x)
    )


def reduce_results(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    _, partials, n_splits = reduce(inputs)
    sums, _ = _launch().combine_gradients(partials, 1, n_splits, inputs.saved)
    dz = inputs.dy.double().masked_fill(inputs.y <= 0, 0)
    mean, rstd = inputs.saved.mean[0].double(), inputs.saved.rstd[0].double()
    x_hat = (inputs.x.double() - mean[:, None, None]) * rstd[:, None, None]
    exact = {"dbias": dz.sum(reference.PER_CHANNEL), "dweight": (dz * x_hat).sum(reference.PER_CHANNEL)}
    return {"dbias": sums[0, 0], "dweight": sums[1, 0]}, exact


def convolution(inputs: Inputs) -> Tensor:
    with cudnn_benchmark(True):
        return F.conv2d(inputs.y, inputs.weight, padding=1)


def convolution_results(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    y, weight = exact_images(inputs.y), inputs.weight.double().contiguous()
    return {"y": convolution(inputs)[:N_CHECKED]}, {"y": F.conv2d(y, weight, padding=1)}


def data_gradient(inputs: Inputs) -> Tensor | None:
    with cudnn_benchmark(True):
        return library_gradients(inputs.dy, inputs.y, inputs.weight, True, False)[0]


def data_gradient_results(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    dx, dy, weight = data_gradient(inputs), exact_images(inputs.dy), inputs.weight.double().contiguous()
    assert dx is not None
    return {"dx": dx[:N_CHECKED]}, {"dx": conv2d_input(dy.shape, weight, dy, padding=1)}


def exact_images(images: Tensor) -> Tensor:
    """Return the first images in fp64, and in NCHW, because cuDNN has few fp64 convolutions in channels_last."""
    return images[:N_CHECKED].double().contiguous()


IN_FP32, IN_BF16 = 0.0, rounding_of("bf16", torch.device("cpu"))
REDUCTIONS = {
    STATISTICS: Case(statistics, statistics_results, IN_FP32),
    REDUCE: Case(reduce, reduce_results, IN_FP32),
}
CONVOLUTIONS = {
    "cuDNN, forward": Case(convolution, convolution_results, IN_BF16),
    "cuDNN, data gradient": Case(data_gradient, data_gradient_results, IN_BF16),
}


def limited(case: Case, variant: str) -> Case:
    def within(function: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
        def run(inputs: Inputs) -> Any:
            with mock.patch.object(tiles, "max_registers", LIMITS[variant]):
                return function(inputs)

        return run

    return Case(within(case.run), within(case.results), case.rounding)


def cases() -> Iterator[tuple[tuple[str, str], Case]]:
    """Yield (name, variant) and the case of everything that is timed."""
    for kernel, case in REDUCTIONS.items():
        for variant in LIMITS:
            yield (kernel, variant), limited(case, variant)
    for name, case in CONVOLUTIONS.items():
        yield (name, "cudnn.benchmark"), case


def predicted_us(kernel: str, variant: str, gpu: Gpu) -> float | None:
    """Return the predicted microseconds, None if the model cannot follow the kernel's path."""
    from benchmarks.speed_model.launches import compile_launch, training_launches, work_of
    from benchmarks.speed_model.simulate import predict

    launches = training_launches("bf16", BATCH, CHANNELS, WIDTH, "none", False)
    recorded = launches["forward" if kernel == STATISTICS else "backward"][0]
    with mock.patch.object(tiles, "max_registers", LIMITS[variant]):
        code = compile_launch(recorded, gpu)
    try:
        return predict(code, work_of(recorded, gpu), gpu, in_l2=False).us
    except ValueError:
        return None


def _launch() -> Any:
    from resnet_fast.ops import launch  # imports triton

    return launch


def measure(device: torch.device, gpu: Gpu | None) -> tuple[list[dict[str, str]], list[str]]:
    """Return the rows of correct cases, and the error messages of the others; `gpu` is None if the model lacks it."""
    generator = torch.Generator(device).manual_seed(torch.seed())
    first = make_inputs(BATCH, device, generator)
    sets = [first, *(make_inputs(BATCH, device, generator) for _ in range(rotation(first.x.nbytes, device) - 1))]
    timed, wrong, turn = {}, [], itertools.cycle(sets)
    for name, case in cases():
        found, exact = case.results(first)
        allowed = Tolerance(case.rounding, 2, BATCH * WIDTH**2)
        try:
            check(", ".join(name), errors(found, exact), dict.fromkeys(exact, 0.0), exact, allowed)
            timed[name] = lambda case=case: case.run(next(turn))
        except WrongProviderError as error:
            wrong.append(str(error))
    rows, flops = [], 2 * 9 * CHANNELS**2 * WIDTH**2 * BATCH
    for (name, variant), times in alternate(timed, device, ROUNDS, WARM_UP, hide_launches=True).items():
        p20, p50, p80 = (1000 * value for value in percentiles(times))
        measured, unit, predicted = p50, "us", ""
        if name in CONVOLUTIONS:
            measured, unit = flops / p50 / 1e6, "TFLOP/s"
            predicted = "{:.0f} to {:.0f}".format(*CUDNN_TFLOPS) if gpu == GPUS["h200"] else ""
        elif gpu and (us := predicted_us(name, variant, gpu)) is not None:
            predicted = f"{us:.1f}"
        row = {"name": name, "variant": variant, "p20_us": f"{p20:.2f}", "p50_us": f"{p50:.2f}", "p80_us": f"{p80:.2f}"}
        row |= {"measured": f"{measured:.1f}", "unit": unit, "predicted": predicted}
        rows.append(row | machine_columns(device))
    return rows, wrong


def main(results: Annotated[Path, typer.Option(help="Folder to which results are written.")] = RESULTS) -> None:
    """Measure what the speed model predicts for an H200: reductions by registers, and cuDNN's convolution."""
    if reason := no_gpu():
        typer.echo(f"error: {reason}", err=True)
        raise typer.Exit(2)
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = next((gpu for gpu in GPUS.values() if gpu.name in torch.cuda.get_device_name(device)), None)
    rows, wrong = measure(device, gpu)
    print(f"{'64x32x32, batch 512, bf16':46}{'measured':>16}{'predicted':>18}")
    for row in rows:
        measured = f"{row['measured']:>8} {row['unit']:7}"
        print(f"{row['name']:22}{row['variant']:24}{measured}{row['predicted']:>18}")
    if rows:
        replace_rows(results / device_slug(device) / "first_predictions.csv", rows, ("name", "variant"))
    for complaint in wrong:
        print(f"error: {complaint}")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)

"""Predict the kernels and the time of ResNet-18's training step (3x3 stem, 32x32 images)."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
import triton

from benchmarks.networks import fused_resnet18
from benchmarks.work import NETWORK, flops

from .gpus import GPUS, Gpu
from .launches import DTYPES, Launch, compile_launch, key_of, training_launches, work_of
from .simulate import predict

# Share of the matrix units' dense peak that convolutions reach. Assumed.
CONVOLUTION_SHARE = 0.65
# Bytes per fp32 weight: SGD with momentum reads weight, gradient and momentum, and writes two of them. Autocast reads
# the weight and writes 16 bits, and the reverse for the gradient.
OPTIMIZER_BYTES, AUTOCAST_BYTES = 5 * 4, 2 * (4 + 2)

KERNEL_KEY = ("channels", "width", "join", "fork", "precision", "batch_size", "direction", "kernel")
STEP_KEY = ("gpu", "precision", "batch_size", "provider")


class Job(NamedTuple):
    """A launch of a fused operation on a GPU.

    operations: number of such operations in a step. launches: number of launches with this key in the operation.
    key: see `launches.key_of`.
    """

    gpu: str
    precision: str
    batch_size: int
    n_channels: int
    width: int
    join: str
    fork: bool
    operations: int
    direction: str
    index: int
    launches: int
    key: str

    @property
    def launch(self) -> Launch:
        operation = (self.precision, self.batch_size, self.n_channels, self.width, self.join, self.fork)
        return training_launches(*operation)[self.direction][self.index]

    @property
    def name(self) -> dict[str, str]:
        """The columns `KERNEL_KEY` of the job's row."""
        values = (self.n_channels, self.width, self.join, "yes" if self.fork else "no", self.precision)
        kernel = self.launch.kernel.__name__
        return dict(zip(KERNEL_KEY, map(str, (*values, self.batch_size, self.direction, kernel)), strict=True))

    def predict(self) -> dict[str, str]:
        """Return the predicted columns of benchmarks/predicted/<gpu>.csv."""
        gpu, launch = GPUS[self.gpu], self.launch
        work, images = work_of(launch, gpu), launch.images()
        in_l2 = all(gpu.holds(image.nbytes) for image in images.values())
        predicted = predict(compile_launch(launch, gpu), work, gpu, in_l2)
        elements = self.batch_size * self.n_channels * self.width**2
        return {
            "predicted_us": f"{predicted.us:.2f}",
            "bound": predicted.bound,
            "of_roof": f"{predicted.roof:.2f}",
            "served_by": "L2" if in_l2 else "memory",
            "mbytes": f"{work.image_bytes / 1e6:.2f}",
            "registers": str(predicted.registers),
            "resident": str(predicted.resident),
            "grid": str(work.grid),
            "waves": f"{predicted.waves:.2f}",
            "kb_in_flight": f"{predicted.bytes_in_flight / 1e3:.0f}",
            "instructions_per_element": f"{predicted.instructions / elements:.1f}",
            "serial_steps": str(predicted.serial_steps),
            "triton": triton.__version__,
            "key": self.key,
        }


def jobs(gpu: str, precision: str, batch_size: int) -> list[Job]:
    """Return the launches of a step; equal ones of an operation are counted in one job."""
    found: dict[tuple, Job] = {}
    for (role, n_channels, width), operations in Counter(NETWORK).items():
        operation = (n_channels, width, role.join, role.fork)
        for direction, launches in training_launches(precision, batch_size, *operation).items():
            for index, launch in enumerate(launches):
                key = key_of(launch, GPUS[gpu])
                new = Job(gpu, precision, batch_size, *operation, operations, direction, index, 0, key)
                job = found.get((operation, key), new)
                found[operation, key] = job._replace(launches=job.launches + 1)
    return list(found.values())


def predict_all(jobs: Sequence[Job]) -> list[dict[str, str]]:
    """Return the jobs' rows. Each key is predicted once, in parallel over the cores."""
    # Jobs that differ only in the batch size are neighbors, so that one process compiles them once.
    distinct = sorted(
        {job.key: job for job in jobs}.values(),
        key=lambda job: (job.launch.kernel.__name__, job.n_channels, job.join, job.fork, job.batch_size),
    )
    with ProcessPoolExecutor() as pool:
        predicted = dict(zip((job.key for job in distinct), pool.map(Job.predict, distinct, chunksize=4), strict=True))
    counts = [{"operations": str(job.operations), "launches": str(job.launches)} for job in jobs]
    return [job.name | count | predicted[job.key] for job, count in zip(jobs, counts, strict=True)]


def step_row(
    gpu: str, precision: str, batch_size: int, provider: str, launches: int, kernels_us: float
) -> dict[str, str]:
    """Return a row of benchmarks/predicted/steps.csv.

    Args:
        gpu, precision, batch_size, provider: the step.
        launches: number of launches of batch norms, additions and ReLU in the step.
        kernels_us: their predicted time in microseconds, without the launches' own.
    """
    batch_norm_us = kernels_us + launches * GPUS[gpu].launch_us
    return {
        "gpu": gpu,
        "precision": precision,
        "batch_size": str(batch_size),
        "provider": provider,
        "launches": str(launches),
        "batch_norm_us": f"{batch_norm_us:.0f}",
        "step_ms": f"{batch_norm_us / 1000 + _others_ms(GPUS[gpu], precision, batch_size):.2f}",
    }


def fused_step_row(gpu: str, precision: str, batch_size: int, rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return the step's row for the project's own kernels, from the kernels' rows."""
    launches = [int(row["operations"]) * int(row["launches"]) for row in rows]
    kernels_us = sum(n * float(row["predicted_us"]) for n, row in zip(launches, rows, strict=True))
    return step_row(gpu, precision, batch_size, "fused", sum(launches), kernels_us)


def _others_ms(gpu: Gpu, precision: str, batch_size: int) -> float:
    """Return the time of convolutions by operations, and of optimizer and weight copies by bytes, without launches."""
    is_16_bit = DTYPES[precision].itemsize == 2
    operations = flops(fused_resnet18, (2, 3, 32, 32), input_needs_gradient=False) / 2 * batch_size
    peak = gpu.tflops_16_bit if is_16_bit else gpu.tflops_fp32
    with torch.device("meta"):
        n_weights = sum(weight.numel() for weight in fused_resnet18().parameters())
    n_bytes = n_weights * (OPTIMIZER_BYTES + is_16_bit * AUTOCAST_BYTES)
    return operations / (CONVOLUTION_SHARE * peak * 1e9) + n_bytes / (gpu.memory_gb_s * 1e6)

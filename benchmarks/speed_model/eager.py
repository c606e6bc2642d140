"""Estimate ATen's kernels by their bytes, in a training step of ResNet-18, 3x3 stem, bf16 autocast, channels_last.

The machine code of ATen's kernels is not available, so the time of a kernel is that of its bytes at a share of the
bandwidth, which is coarser than a prediction from machine code. The dispatched operators are counted on fake tensors
(tests/test_speed_model_peers.py). Their kernels are those of torch 2.13's Normalization.cu and .cuh. In bf16 batch
norms are ATen's. In fp16 they are cuDNN's, with the same bytes in fewer launches, but are estimated by the same rows.
"""

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.networks import eager_resnet18
from benchmarks.work import NETWORK

from .gpus import Gpu
from .rows import Row

ITEM_SIZE = 2  # of an image's element
# Shares of the bandwidth that a kernel reaches. For eager's norms in bf16 on a GPU of the H200's class, which copies at
# 4300 GB/s, cudnn-frontend publishes 3094 GB/s forward and 1542 backward, counting each input and output once. Assumed:
# the backward reads its inputs twice, like a batch norm's, so its kernels move 5/3 of these bytes. These are norms over
# a row. It is a guess that batch norms reach the same share, also on other GPUs and in the L2 cache.
NORM_FORWARD, NORM_BACKWARD = 3094 / 4300, 5 / 3 * 1542 / 4300
ELEMENTWISE = 0.9  # vectorized by TensorIterator; assumed
# Least time of a kernel, without its launch. Assumed; the model predicts 0.4 to 1.1 for Inductor's on a few vectors.
SHORTEST_US = 0.8


class Kernel(NamedTuple):
    """A kernel: the images that it reads and writes, 0 if it works on vectors, and its share of the bandwidth."""

    name: str
    reads: int = 0
    writes: int = 0
    share: float = ELEMENTWISE


BATCH_NORM = (
    Kernel("zero semaphores"),  # for the reduction over programs, with 2048 rows or more
    Kernel("batch_norm_collect_statistics_channels_last_kernel", 1, 0, NORM_FORWARD),
    Kernel("batch_norm_update_stats_and_invert"),
    Kernel("batch_norm_transform_input_channels_last_kernel", 1, 1, NORM_FORWARD),
)
BATCH_NORM_BACKWARD = (
    Kernel("zero semaphores"),
    Kernel("batch_norm_backward_reduce_channels_last_kernel", 2, 0, NORM_BACKWARD),
    Kernel("batch_norm_backward_elemt_channels_last_kernel", 2, 1, NORM_BACKWARD),
)
ADD = Kernel("add_ (residual)", 2, 1)
RELU = Kernel("relu_", 1, 1)
RELU_BACKWARD = Kernel("threshold_backward", 2, 1)
GRADIENT_ADD = Kernel("add (gradients of a fork)", 2, 1)
COUNTER = Kernel("add_ (num_batches_tracked)")


def operation_kernels(join: str, fork: bool) -> tuple[Kernel, ...]:
    """Return the kernels of a fused operation that ends in ReLU, forward and backward; see `work.operation_bytes`."""
    norms = (BATCH_NORM + BATCH_NORM_BACKWARD) * (2 if join == "bn" else 1)
    joins = (ADD,) if join != "none" else ()
    return (*norms, *joins, RELU, RELU_BACKWARD, *((GRADIENT_ADD,) if fork else ()))


def cast_elements(batch_size: int) -> Counter[int]:
    """Return how many copies between fp32 and 16 bits autocast makes in a step, by their elements.

    They are the weights and the linear layer's bias in each direction, the images, the logits and the logits' gradient.
    """
    with torch.device("meta"):
        model = eager_resnet18()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    copies = Counter(parameter.numel() for layer in layers for parameter in layer.parameters() for _ in range(2))
    copies[batch_size * 3 * 32 * 32] += 1
    copies[batch_size * layers[-1].weight.shape[0]] += 2
    return copies


def eager_rows(gpu: Gpu, batch_size: int) -> list[Row]:
    """Return a row for each kernel and image size."""
    counts: Counter[tuple[Kernel, int, int]] = Counter()  # by kernel, channels and elements
    for role, n_channels, width in NETWORK:
        for kernel in operation_kernels(role.join, role.fork):
            counts[kernel, n_channels, batch_size * n_channels * width * width] += 1
    rows = []
    for (kernel, n_channels, n_elements), n in counts.items():
        name = f"{kernel.name}, {n_channels} channels"
        n_bytes = (kernel.reads + kernel.writes) * n_elements * ITEM_SIZE
        us = kernel_us(n_bytes, gpu, kernel.share, gpu.holds(n_elements * ITEM_SIZE))
        rows.append(Row("eager", "batch norm", name, n, us, n_bytes))
    n_norms = sum(n for (kernel, _, _), n in counts.items() if kernel == BATCH_NORM[1])
    rows.append(Row("eager", "counter", COUNTER.name, n_norms, SHORTEST_US, 0.0))
    for n_elements, n in cast_elements(batch_size).items():
        n_bytes = n_elements * (4 + ITEM_SIZE)
        us = kernel_us(n_bytes, gpu, ELEMENTWISE, gpu.holds(4 * n_elements))
        rows.append(Row("eager", "cast", f"_to_copy, {n_elements} elements", n, us, n_bytes))
    return rows


def kernel_us(n_bytes: float, gpu: Gpu, share: float, in_l2: bool) -> float:
    bandwidth = share * (gpu.l2_gb_s if in_l2 else gpu.memory_gb_s)
    return max(SHORTEST_US, n_bytes / bandwidth / 1000)

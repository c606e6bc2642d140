"""Counts what fused operations and a network do on the host, on the stub driver; prints JSON."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import stub_driver


def image(n_channels: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(2, n_channels, width, width, dtype=dtype).contiguous(memory_format=torch.channels_last)


def calls(function: Callable[[], object]) -> Counter:
    """How often each Python function is called, by its name and its file's; and "launch", Triton's in C."""
    found: Counter = Counter()

    def note(frame, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ == "launch":
            found["launch"] += 1
        if event == "call":
            found[f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}"] += 1

    for _ in range(4):  # records what is recorded
        function()
    sys.setprofile(note)
    function()
    sys.setprofile(None)
    return found


def operation(dtype: torch.dtype) -> dict[str, Counter]:
    """BN + add + ReLU in training."""
    from resnet_fast import FusedBatchNorm2d

    x, residual = (image(64, 2, dtype).requires_grad_() for _ in range(2))
    dy, norm = image(64, 2, dtype), FusedBatchNorm2d(64)

    def forward(fork: bool = False):
        return norm.fused(x, residual, relu=True, fork=fork)

    def both() -> None:
        torch.autograd.backward(forward(fork=True), [dy, dy])

    return {f"forward, {dtype}": calls(forward), f"forward and backward, {dtype}": calls(both)}


def network() -> dict[str, Counter]:
    from resnet_fast import resnet18

    network, images = resnet18(num_classes=10, stem="cifar"), image(3, 8)
    training = calls(lambda: network(images).sum().backward())
    network.eval()
    with torch.no_grad():
        return {"network, training": training, "network, evaluation": calls(lambda: network(images[:1]))}


if __name__ == "__main__":
    stub_driver.put_in_place()
    torch.set_num_threads(1)
    print(json.dumps(operation(torch.float32) | operation(torch.bfloat16) | network()))

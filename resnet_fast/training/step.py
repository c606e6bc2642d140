"""One training step, as the training loop, the profile and the benchmarks run it.

    step = zero the gradients -> forward -> cross entropy -> backward -> optimizer

Numerics: in bf16 the forward runs under autocast: convolutions and the linear layer in bf16; weights, their gradients,
the optimizer, the batch-norm statistics and the loss in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """Run one step on a batch; the gradients stay to be looked at until the next.

    Args:
        model: gives logits, [N, classes].
        optimizer: of its parameters.
        images: [N, 3, H, W], normalized.
        labels: [N], int64.
        precision: "fp32" or "bf16".

    Returns:
        The mean loss, [], in fp32, and the logits, without their graph.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(images.device, precision):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which the forward runs."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

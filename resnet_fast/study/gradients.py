"""The norm of the loss's gradient in each layer of a network.

    norm(l) = ||dL/dW_l||₂    for the l-th convolution; l = 1 is the stem

The network runs in training mode, with batch statistics, as in a training step.
"""

import copy

import torch
from torch import Tensor, nn

from resnet_fast.training.step import forward_loss


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Return the L2 norm of the gradient of each convolution's weight, from the input to the output.

    Convolutions of projection shortcuts are left out. The model is unchanged, including its running statistics and
    gradients.

    Args:
        model: returns logits, [N, classes].
        images: [N, 3, H, W], normalized, on the model's device.
        labels: [N], int64.
    """
    model = copy.deepcopy(model).train()
    model.zero_grad(set_to_none=True)
    loss, _ = forward_loss(model, images, labels, "fp32")
    loss.backward()
    convolutions = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and "downsample" not in name.split(".")
    ]
    norms = torch.stack([torch.linalg.vector_norm(conv.weight.grad) for conv in convolutions])  # type: ignore[arg-type]
    return norms.tolist()

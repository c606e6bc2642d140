"""Classify an image with a trained network."""

import torch
from torch import Tensor

from resnet_fast.common.checks import check_type
from resnet_fast.data import normalize
from resnet_fast.inference.trained import Trained


@torch.inference_mode()
def classify(trained: Trained, image: Tensor) -> Tensor:
    """Return the probability of each class.

    Args:
        trained: the network, on any device.
        image: [3, H, W], uint8, as `read_image` returns it.

    Returns:
        Softmax probabilities [classes], fp32, on the CPU.

    Raises:
        TypeError: `trained` is not a Trained, or `image` is not a Tensor.
        ValueError: `image` is not [3, H, W] or not uint8.
    """
    check_type("trained", trained, Trained)
    check_type("image", image, Tensor)
    if image.ndim != 3 or len(image) != 3 or image.dtype != torch.uint8:
        raise ValueError(f"image must be [3, H, W], torch.uint8, got {list(image.shape)}, {image.dtype}")
    device = next(trained.model.parameters()).device
    images = normalize(image[None].to(device), trained.mean, trained.std)
    return trained.model(images)[0].float().softmax(0).cpu()

"""Compute a network's logits for a split, batch by batch, in a given precision."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from resnet_fast.data import Split, normalize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context for a forward pass in a precision: autocast to bf16 or fp16, or none for fp32."""
    is_low = precision != "fp32"
    return torch.autocast(device.type, dtype=DTYPES[precision] if is_low else None, enabled=is_low)


def logits_of(
    model: nn.Module,
    split: Split,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    precision: str,
    flip: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Yield images, uint8 [B, 3, H, W], labels, [B], logits, fp32 [B, classes], and logits of the mirror images.

    Args:
        model: in evaluation mode.
        split: on the model's device.
        mean, std: per channel, of images in [0, 1].
        batch_size: images per batch.
        precision: "fp32", "bf16" or "fp16".
        flip: also compute logits of the mirror images; if False, they are None.
    """
    for images, labels in split.batches(batch_size):
        x = normalize(images, mean, std)
        with autocast(images.device, precision):
            logits = model(x).float()
            mirrored = model(x.flip(3)).float() if flip else None
        yield images, labels, logits, mirrored

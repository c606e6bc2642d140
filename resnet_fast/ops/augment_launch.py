"""The launch of the augmentation kernel (kernels/augment.py). Imports triton."""

import torch
import triton
from torch import Tensor

from resnet_fast.kernels import augment as augment_kernels
from resnet_fast.kernels import tiles

from . import launch


def augment(
    images: Tensor,
    labels: Tensor,
    plan: Tensor,
    shift: tuple[float, ...],
    scale: tuple[float, ...],
    padding: int,
    reflect: bool,
    cutout: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the batch that `plan` describes, and its labels."""
    n_batch, (height, width) = len(plan), images.shape[2:]
    y = torch.empty(n_batch, 3, height, width, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    batch_labels = labels.new_empty(n_batch)
    launch.launch_kernel(
        augment_kernels.augment_kernel,
        (n_batch * triton.cdiv(height * width, tiles.AUGMENT_PIXELS),),
        images_ptr=images,
        labels_ptr=labels,
        plan_ptr=plan,
        y_ptr=y,
        batch_labels_ptr=batch_labels,
        height=height,
        width=width,
        padding=padding,
        cutout=cutout,
        shift_red=shift[0],
        shift_green=shift[1],
        shift_blue=shift[2],
        scale_red=scale[0],
        scale_green=scale[1],
        scale_blue=scale[2],
        REFLECT=reflect,
        BLOCK_P=tiles.AUGMENT_PIXELS,
    )
    return y, batch_labels

"""Random crop, horizontal flip and normalization of a uint8 batch, on its device.

With per-image shifts (sy, sx) in 0 … 2·padding and a per-image flip,

    y[n, c, i, j] = (x[n, c, i + sy - padding, j' + sx - padding] / 255 - mean[c]) / std[c]
    j' = j, or W - 1 - j where the image is flipped;   x is 0 (black) outside of the image

which is torchvision's RandomCrop(padding) -> RandomHorizontalFlip -> ToTensor -> Normalize, for a whole batch at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `padding` pixels each way and mirror half of them.

    The random numbers are drawn on the generator's device and then moved, so that a CPU generator gives the same
    augmentation wherever the images are.

    Args:
        images: [N, 3, H, W], any dtype.
        padding: pixels, 0 for no crop.
        flip: mirror each image with probability 1/2.
        generator: the only source of randomness.

    Returns:
        [N, 3, H, W], the dtype of `images`, channels_last.
    """
    n_images, _, height, width = images.shape
    draws = torch.randint(0, 2 * padding + 1, (2, n_images), generator=generator, device=generator.device)
    mirrored = torch.rand(n_images, generator=generator, device=generator.device) < 0.5
    if not flip:
        mirrored.zero_()

    device = images.device
    shift_y, shift_x = draws.to(device, non_blocking=True)
    rows = shift_y[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(n_images, width)
    columns = torch.where(mirrored.to(device, non_blocking=True)[:, None], width - 1 - columns, columns)
    columns = columns + shift_x[:, None]

    padded = F.pad(images, (padding,) * 4)
    index = torch.arange(n_images, device=device)[:, None, None]
    # Indices around a slice put the sliced channels last: the gather writes NHWC, which seen as NCHW is channels_last.
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Scale bytes to [0, 1], subtract the mean and divide by the standard deviation of each channel.

    Args:
        images: [N, 3, H, W], uint8.
        mean, std: one value per channel, of images in [0, 1].

    Returns:
        [N, 3, H, W], fp32, channels_last.
    """
    scale = 1 / (255 * torch.tensor(std, device=images.device))
    shift = torch.tensor(mean, device=images.device) * 255
    images = images.to(dtype=torch.float32, memory_format=torch.channels_last)
    return (images - shift[:, None, None]) * scale[:, None, None]

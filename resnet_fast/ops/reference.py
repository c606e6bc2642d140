"""The specification: batch norm + residual + ReLU and its gradients in plain PyTorch, one line per equation.

The equations S, N and B are derived in kernels/README.md. With ghost batches they hold for each group of images,
`x.split(ghost_batch_size)`, separately; only dweight and dbias are sums over the groups. All functions are
differentiable, in any floating type. The kernels are tested against them in fp64, and second derivatives are computed
by `statistics` and `normalize`.
"""

import torch
from torch import Tensor

PER_CHANNEL = (0, 2, 3)  # reduce x: [N, C, H, W] to [C]


def _channels(vector: Tensor) -> Tensor:
    """View [C] as [1, C, 1, 1]."""
    return vector[None, :, None, None]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of x: [N, C, H, W] per channel (S1, S2)."""
    mean = x.mean(PER_CHANNEL)
    return mean, (x - _channels(mean)).square().mean(PER_CHANNEL)


def normalize(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return (x - mean) · rstd · weight + bias (N1)."""
    scale = rstd if weight is None else rstd * weight
    z = (x - _channels(mean)) * _channels(scale)
    return z if bias is None else z + _channels(bias)


def forward(
    x: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """Compute relu(bn(x) + residual) (N1-N3), with batch statistics unless `mean` and `var`, [C], are given.

    The bn join is `forward(x, ..., residual=forward(shortcut, ..., relu=False))`.
    """
    if mean is None or var is None:
        mean, var = statistics(x)
    z = normalize(x, mean, (var + eps).rsqrt(), weight, bias)
    if residual is not None:
        z = z + residual
    return z.relu() if relu else z


def gradient_sums(dz: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ dz and Σ dz·x̂ (B2), which are dbias and dweight (B3); `dz` is the gradient of the pre-activation."""
    return dz.sum(PER_CHANNEL), (dz * normalize(x, mean, rstd, None, None)).sum(PER_CHANNEL)


def input_gradient(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    mean_dz: Tensor,
    mean_dz_xhat: Tensor,
    training: bool,
) -> Tensor:
    """Return dx, from the sums of B2 divided by M (B4), or with frozen statistics (B5)."""
    if training:
        dz = dz - _channels(mean_dz) - normalize(x, mean, rstd, None, None) * _channels(mean_dz_xhat)
    return _channels(rstd if weight is None else rstd * weight) * dz


def backward(
    dz: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias of one batch norm."""
    dbias, dweight = gradient_sums(dz, x, mean, rstd)
    n_rows = x.numel() // x.shape[1]
    return input_gradient(dz, x, mean, rstd, weight, dbias / n_rows, dweight / n_rows, training), dweight, dbias


def unpack_relu_mask(relu_mask: Tensor, x: Tensor, ghost_batch_size: int = 0) -> Tensor:
    """Unpack the kernels' ReLU bits to a bool tensor with the shape and layout of x: true where ReLU's output is 0.

    `ghost_batch_size`: images per group, 0 for one group; in NCHW the bits of each group start a new byte.
    """
    n_images, n_channels, height, width = x.shape
    bits = ((relu_mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=x.device)) & 1).bool()
    if x.is_contiguous(memory_format=torch.channels_last):
        return bits.flatten(1)[:, :n_channels].view(n_images, height, width, n_channels).permute(0, 3, 1, 2)
    group_sizes = [len(group) for group in x.split(ghost_batch_size or n_images)]
    n_bytes = [-(-size * height * width // 8) for size in group_sizes]
    group_bits = bits.flatten().split([n_channels * 8 * n for n in n_bytes])
    return torch.cat(
        [
            one_group.view(n_channels, -1)[:, : size * height * width].view(n_channels, size, height, width)
            for one_group, size in zip(group_bits, group_sizes, strict=True)
        ],
        dim=1,
    ).transpose(0, 1)

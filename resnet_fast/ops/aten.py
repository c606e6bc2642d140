"""Forward and backward on ATen's operators: what CPU tensors run on, and what a caller gets by naming "aten".

Step for step what eager PyTorch computes, rounding included, with the addition and ReLU in place. ReLU's sign is read
off the output y, which the next convolution keeps alive anyway.
"""

import torch
from torch import Tensor

from .arguments import BatchNormArgs, Gradients, Join, Outputs, Saved, accumulation_type


def _batch_norm(x: Tensor, norm: BatchNormArgs) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = torch.native_batch_norm(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps
    )
    acc_type = accumulation_type(x)
    if norm.training:
        return y, mean.to(acc_type), rstd.to(acc_type)
    assert norm.running_mean is not None and norm.running_var is not None
    # A copy: the tracked statistics may move on before the backward runs.
    return y, norm.running_mean.to(acc_type, copy=True), (norm.running_var.to(acc_type) + norm.eps).rsqrt()


def forward(
    x: Tensor, norm: BatchNormArgs, residual: Tensor | None, residual_norm: BatchNormArgs | None, relu: bool
) -> Outputs:
    y, mean, rstd = _batch_norm(x, norm)
    residual_mean = residual_rstd = None
    if residual is not None and residual_norm is not None:
        residual, residual_mean, residual_rstd = _batch_norm(residual, residual_norm)
    if residual is not None:
        y.add_(residual)
    if relu:
        y.relu_()
    return Outputs(y, None, mean, rstd, residual_mean, residual_rstd)


def _batch_norm_backward(
    dz: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, training: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if weight is not None:  # ATen keeps statistics in the parameters' type
        mean, rstd = mean.to(weight.dtype), rstd.to(weight.dtype)
    # Frozen: ATen wants the variance and adds eps again; rstd already holds both.
    running = (None, None) if training else (mean, rstd.square().reciprocal())
    wanted = [True, weight is not None, bias is not None]
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        dz, x, weight, *running, mean, rstd, training, 0.0, wanted
    )
    return dx, dweight if wanted[1] else None, dbias if wanted[2] else None


def backward(
    dy: Tensor, dy_alias: Tensor | None, saved: Saved, join: Join, relu: bool, training: bool, residual_training: bool
) -> Gradients:
    dz = dy if dy_alias is None else dy + dy_alias
    if relu:
        assert saved.y is not None
        dz = torch.ops.aten.threshold_backward(dz, saved.y, 0)
    dx, dweight, dbias = _batch_norm_backward(dz, saved.x, saved.weight, saved.bias, saved.mean, saved.rstd, training)
    if join != "bn":
        return Gradients(dx, dweight, dbias, dz if join == "add" and dz is not dy else None, None, None)
    assert saved.residual is not None and saved.residual_mean is not None and saved.residual_rstd is not None
    residual_gradients = _batch_norm_backward(
        dz,
        saved.residual,
        saved.residual_weight,
        saved.residual_bias,
        saved.residual_mean,
        saved.residual_rstd,
        residual_training,
    )
    return Gradients(dx, dweight, dbias, *residual_gradients)

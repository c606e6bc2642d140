"""Batch norm with the residual addition and ReLU fused in, as a module."""

from torch import Tensor, nn

from .functional import BatchNormArgs, batch_norm_add_relu


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that can add a residual and end in ReLU, in one operation.

        y = max(0, bn(x) + residual)

    The same constructor, parameters, buffers, checkpoint keys and modes as nn.BatchNorm2d.

    Args:
        num_features: C.
        relu: whether `forward` ends in ReLU. Default False: then it computes what nn.BatchNorm2d computes.
        eps, momentum, affine, track_running_stats, device, dtype: as in nn.BatchNorm2d.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        relu: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """relu(bn(x) + residual); x and residual: [N, C, H, W]. Errors are those of `batch_norm_add_relu`."""
        self._check_input_dim(x)
        return self.fused(x, residual, relu=self.relu)

    def fused(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        residual_norm: "FusedBatchNorm2d | None" = None,
        *,
        relu: bool,
        fork: bool = False,
    ):
        """`forward` with every join, for blocks that fuse over their submodules: see `batch_norm_add_relu`."""
        return batch_norm_add_relu(
            x,
            *self.arguments(),
            residual=residual,
            residual_norm=None if residual_norm is None else residual_norm.arguments(),
            relu=relu,
            fork=fork,
        )

    def arguments(self) -> BatchNormArgs:
        """What one forward pass uses; counts the batch in training, as nn.BatchNorm2d's forward does."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        use_running = not self.training or self.track_running_stats
        return BatchNormArgs(
            self.running_mean if use_running else None,
            self.running_var if use_running else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (", relu=True" if self.relu else "")

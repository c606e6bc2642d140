"""Batch norm with the residual addition and ReLU fused in, as a module."""

from typing import Any

from torch import Tensor, fx, nn

from .functional import BatchNormArgs, check_arguments, run


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
        if isinstance(x, fx.Proxy):  # torch.fx takes nn.BatchNorm2d as one step, whose mode may still change: so here
            tracer: Any = x.tracer
            arguments = (x,) if residual is None else (x, residual)
            return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, {})
        return self.fused(x, residual, relu=self.relu)

    def fused(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        residual_norm: "FusedBatchNorm2d | None" = None,
        *,
        relu: bool,
        fork: bool = False,
    ) -> Any:
        """`forward` with every join, for blocks that fuse over their submodules.

        Args:
            x, residual: [N, C, H, W].
            residual_norm: the batch norm of the residual, [C].
            relu, fork: as in `batch_norm_add_relu`; the module's own `relu` does not count here.

        Returns:
            y: [N, C, H, W], or (y, alias of y) with `fork`.
        """
        norm, residual_args = self.arguments(), None if residual_norm is None else residual_norm.arguments()
        check_arguments(x, norm, residual, residual_args)  # a batch that is refused is not counted
        for module in (self, residual_norm):
            counter = None if module is None else module.counter()
            if counter is not None:
                counter.add_(1)
        return run(x, norm, residual, residual_args, relu, fork)

    def counter(self) -> Tensor | None:
        """`num_batches_tracked`, where this pass counts as a batch."""
        return self.num_batches_tracked if self.training and self.track_running_stats else None

    def arguments(self) -> BatchNormArgs:
        """What one forward pass uses."""
        momentum = 0.0 if self.momentum is None else self.momentum
        counter = self.counter()
        if self.momentum is None and counter is not None:  # cumulative average
            momentum = 1.0 / (float(counter) + 1.0)
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

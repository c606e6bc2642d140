"""Batch norm modules that fuse the residual addition and ReLU, for one process or several."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from .common.checks import check_type
from .functional import BatchNormArgs, find_call
from .ops.checks import check_ghost_batch_size, count_groups
from .ops.distributed import Group

_pass = threading.local()  # batches: num_batches_tracked of a norm -> the number still to be added to it


def count_together() -> AbstractContextManager[None]:
    """Return a context that counts the batches of all norms run inside in one launch, at its end, even after an error.

    Do not read a counter inside. A norm with momentum=None counts at once, because it divides by its counter.
    """
    # A compiler merges launches itself, and torch.vmap does not support multi-tensor operators.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return nullcontext()
    return _counting_together()


@contextmanager
def _counting_together() -> Iterator[None]:
    before = getattr(_pass, "batches", None)
    batches = _pass.batches = {}
    try:
        yield
    finally:
        _pass.batches = before
        if batches:
            torch._foreach_add_(list(batches), list(batches.values()))  # type: ignore[attr-defined]


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that can add a residual and end in ReLU, in one operation.

        y = max(0, bn(x) + residual)

    Constructor, parameters, buffers, checkpoint keys and modes are those of nn.BatchNorm2d.

    Args:
        num_features: C.
        relu: whether `forward` ends in ReLU. With False, the default, it computes what nn.BatchNorm2d computes.
        ghost_batch_size: if batch statistics are used, normalize each group of this many consecutive images with its
            own statistics, as if nn.BatchNorm2d were called on each group in order (Hoffer et al. 2017,
            arXiv:1705.08741). Each group updates the running statistics and counts as a batch. None: one group.
        eps, momentum, affine, track_running_stats, device, dtype: as in nn.BatchNorm2d.
        kwargs: further arguments of the installed torch's nn.BatchNorm2d, such as `bias`.

    Raises:
        TypeError: relu is not a bool, or ghost_batch_size is not an int.
        ValueError: ghost_batch_size is less than 1.
    """

    # Defaults for modules that an earlier version pickled, or whose class was changed.
    ghost_batch_size: int | None = None
    _name = ""  # its name in the model that convert_sync_batchnorm changed

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
        ghost_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_type("relu", relu, bool)
        check_ghost_batch_size(ghost_batch_size)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs)
        self.relu = relu
        self.ghost_batch_size = ghost_batch_size

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return bn(input) + residual, followed by ReLU if `self.relu`; all tensors are [N, C, H, W].

        Raises the errors of `batch_norm_add_relu`. Raises ValueError if the input is not 4-D, or if ghost batches
        update running statistics while momentum is None.
        """
        if isinstance(input, fx.Proxy):  # one step to torch.fx, as nn.BatchNorm2d is, so that the mode may still change
            tracer: Any = input.tracer
            arguments = (input,) if residual is None else (input, residual)
            return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, {})
        return self.fused(input, residual, relu=self.relu)

    def fused(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        residual_norm: "FusedBatchNorm2d | None" = None,
        *,
        relu: bool,
        fork: bool = False,
    ) -> Any:
        """Run `forward` with all its options, for blocks that fuse over their submodules.

        Args:
            x, residual: [N, C, H, W].
            residual_norm: the batch norm of the residual, [C].
            relu, fork: as in `batch_norm_add_relu`; the module's own `relu` is ignored.

        Returns:
            y: [N, C, H, W], or (y, alias of y) with `fork`.
        """
        if x.dim() != 4:
            self._check_input_dim(x)
        norm, residual_args, modules = self.arguments(), None, (self,)
        if residual_norm is not None:
            residual_args, modules = residual_norm.arguments(), (self, residual_norm)
        group, ghost_batch_size = None, self.ghost_batch_size
        if residual_norm is not None or ghost_batch_size is not None or type(self) is not FusedBatchNorm2d:
            group = self._group_with(residual_norm)
            ghost_batch_size = _common_ghost_batch_size(modules, (norm, residual_args))
        call = find_call(x, norm, residual, residual_args, relu, None, group, ghost_batch_size)
        for module in modules:  # after find_call, so that a refused batch is not counted
            if module.training:
                module.count(1 if ghost_batch_size is None else count_groups(x, ghost_batch_size))
        return call(x, norm, residual, residual_args, fork)

    def group(self) -> dist.ProcessGroup | None:
        """Return the processes that share batch statistics, or None if this process has its own."""
        return None

    def _group_with(self, residual_norm: "FusedBatchNorm2d | None") -> Group | None:
        processes = self.group()
        if residual_norm is not None and residual_norm.training and residual_norm.group() is not processes:
            raise ValueError("residual_norm must be synchronized over the same processes as the norm that it joins")
        if processes is None:
            return None
        return Group(processes, f"{self._name} {type(self).__name__}({self.num_features})".lstrip())

    def counter(self) -> Tensor | None:
        """Return `num_batches_tracked` if this pass counts as a batch, else None."""
        return self._buffers["num_batches_tracked"] if self.training and self.track_running_stats else None

    def count(self, n_batches: int) -> None:
        """Add to `num_batches_tracked` if this pass counts as a batch."""
        counter = self.counter()
        if counter is None:
            return
        batches = None if torch.compiler.is_compiling() else getattr(_pass, "batches", None)
        if batches is None or self.momentum is None:
            counter.add_(n_batches)
        else:
            batches[counter] = batches.get(counter, 0) + n_batches

    def arguments(self) -> BatchNormArgs:
        """Return the statistics, parameters and settings of this forward pass."""
        parameters, buffers, training = self._parameters, self._buffers, self.training
        try:  # nn.Module's own lookup costs more than the rest
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var = buffers["running_mean"], buffers["running_var"]
        except KeyError:  # parametrized, or pruned
            weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        momentum = self.momentum
        if momentum is None:
            counter = self.counter()
            momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)  # cumulative average
        uses_batch = training or (mean is None and var is None)
        if training and not self.track_running_stats:
            mean = var = None
        return BatchNormArgs(mean, var, weight, bias, uses_batch, momentum, self.eps)

    def extra_repr(self) -> str:
        ghosts = "" if self.ghost_batch_size is None else f", ghost_batch_size={self.ghost_batch_size}"
        return super().extra_repr() + (", relu=True" if self.relu else "") + ghosts


def _common_ghost_batch_size(modules, norms) -> int | None:
    """Return the ghost_batch_size of the modules that use batch statistics in this pass."""
    using = [module for module, norm in zip(modules, norms, strict=False) if norm.training]
    sizes = [module.ghost_batch_size for module in using]
    if len(set(sizes)) > 1:
        raise ValueError(f"norms that are joined must have the same ghost_batch_size, got {sizes[0]} and {sizes[1]}")
    for module in using:
        if module.ghost_batch_size is not None and module.momentum is None and module.counter() is not None:
            raise ValueError(
                "momentum must be a number with a ghost_batch_size, because a cumulative average would weight each "
                f"group differently, got momentum=None and ghost_batch_size={module.ghost_batch_size}"
            )
    return sizes[0] if sizes else None


class FusedSyncBatchNorm2d(FusedBatchNorm2d):
    """FusedBatchNorm2d with batch statistics over all processes: a fused nn.SyncBatchNorm.

    Processes may have different numbers of images, even none. The backward sums over the processes what dx needs.
    Gradients of weight and bias cover this process's images only; DistributedDataParallel averages them. In evaluation
    mode, without `torch.distributed`, or with one process, it is a FusedBatchNorm2d. Runs on CPU (gloo) and GPU (NCCL).

    Every process must take part in every training step. As for nn.SyncBatchNorm, `model.join()` and `Join` do not
    support collectives in the forward pass. If one process may run out of batches before the others, use
    `throw_on_early_termination=True`; otherwise the others wait until the process group's timeout.

    Args:
        process_group: the processes to synchronize; None for all.
        relu and the rest: as in FusedBatchNorm2d, in nn.SyncBatchNorm's order.

    Raises:
        ValueError: in forward, as FusedBatchNorm2d, except that one value per channel and process is enough; or the
            module has a ghost_batch_size, which would split the joint batch.
        RuntimeError: in forward, a process died, or did not answer within the timeout of the process group. The message
            names the layer, unless NCCL reports the timeout outside of Python.

    Zhang et al. 2018, Context Encoding for Semantic Segmentation, arXiv:1803.08904, for the idea.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device=None,
        dtype=None,
        *,
        relu: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, relu=relu, **kwargs)
        self.process_group = process_group

    def group(self) -> dist.ProcessGroup | None:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Synchronize the batch norms of a model over several processes, in place.

    FusedBatchNorm2d and nn.BatchNorm2d become FusedSyncBatchNorm2d; 1-D and 3-D batch norms become nn.SyncBatchNorm.
    nn.SyncBatchNorm.convert_sync_batchnorm is no substitute: it would drop the residual and ReLU of FusedBatchNorm2d.

    Args:
        module: a model, or a batch norm itself. Each batch norm stores its name in the model for error messages.
        process_group: the processes to synchronize; None for all.

    Returns:
        `module`.

    Raises:
        TypeError: module is not an nn.Module, process_group is not a ProcessGroup, or a batch norm has another class,
            whose forward is unknown. The model is unchanged.
        ValueError: a batch norm has a ghost_batch_size, which synchronization would undo. The model is unchanged.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {module!r}")
    if not isinstance(process_group, dist.ProcessGroup | None):
        raise TypeError(f"process_group must be a ProcessGroup or None, got {process_group!r}")
    fused, plain = [], []
    for name, norm in module.named_modules():
        if isinstance(norm, FusedBatchNorm2d) and norm.ghost_batch_size is not None:
            raise ValueError(
                f"{name or 'module'} must have no ghost_batch_size, which synchronization would undo, "
                f"got {norm.ghost_batch_size}"
            )
        if type(norm) in (nn.BatchNorm2d, FusedBatchNorm2d, FusedSyncBatchNorm2d):
            fused.append((name, norm))
        elif type(norm) in (nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm):
            plain.append(norm)
        elif isinstance(norm, nn.modules.batchnorm._BatchNorm):
            raise TypeError(f"{name or 'module'} must be a batch norm of torch or resnet_fast, got {type(norm)}")
    # Only the class changes, so that parameters, hooks, and a module used in two places stay unchanged.
    for name, norm in fused:
        norm.relu = getattr(norm, "relu", False)
        norm.__class__ = FusedSyncBatchNorm2d
        norm._name, norm.process_group = name, process_group
    for norm in plain:
        norm.__class__ = nn.SyncBatchNorm
        norm.process_group = process_group
    return module

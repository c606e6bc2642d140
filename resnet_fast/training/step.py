"""One training step.

    step = zero the gradients -> augment, mix -> forward -> cross entropy -> backward -> clip -> optimizer -> average

A recipe may also reduce the images after mixing (resizing.py) and apply Lookahead every fifth step (lookahead.py).

`TrainingStep` runs all of it. With `graph`, the second batch is recorded as a CUDA graph and later ones replay it
(graphed.py), except for the short batch at the end of an epoch. `training_step` is the part from augmented images to
the optimizer, which profile and benchmarks compare.

Numerics: in bf16, autocast runs convolutions and the linear layer in bf16. Weights, their gradients, the optimizer, the
batch-norm statistics and the loss are fp32. `TrainingStep` casts all weights together, with the same bits as autocast's
own casts (cast_weights.py).

fp16 works likewise, with a loss scale that keeps small gradients from becoming 0 (loss_scale.py). A step whose
gradients overflow is skipped: weights, optimizer state and moving average stay unchanged. As in any loop with
torch.amp.GradScaler, its forward still updates the running statistics, and the schedule of the learning rate advances.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from resnet_fast.common.checks import check_choice, check_integer, check_type
from resnet_fast.data import Augmentation, Batch
from resnet_fast.evaluation.logits import DTYPES, autocast
from resnet_fast.ops.backend import cudnn_benchmark, device_guard
from resnet_fast.ops.regions import Mixture
from resnet_fast.training.average import Average
from resnet_fast.training.cast_weights import cast_weights
from resnet_fast.training.graph import CudaGraph
from resnet_fast.training.graphed import MakeGraph, graphed
from resnet_fast.training.lookahead import Lookahead
from resnet_fast.training.loss_scale import has_overflowed, load_scale, make_scaler
from resnet_fast.training.optimizer import make_optimizer
from resnet_fast.training.options import settings_of
from resnet_fast.training.recipes import Recipe, check_together
from resnet_fast.training.resizing import Sizes, fresh_statistics, resized
from resnet_fast.training.schedule import SCHEDULES
from resnet_fast.training.structure import copy_into, first_difference


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    precision: str,
    scaler: GradScaler,
) -> tuple[Tensor, Tensor]:
    """Run one step on an augmented batch; the gradients remain readable until the next step.

    Args:
        model: a network that returns logits, [N, classes].
        optimizer: the optimizer of the model's parameters.
        images: [N, 3, H, W], floating point, normalized.
        labels: [N], int64.
        precision: "fp32", "bf16" or "fp16".
        scaler: the loss scaler (`make_scaler`), enabled in fp16 only. An enabled one waits for the GPU unless the
            optimizer is fused.

    Returns:
        The mean loss, [], fp32, and the logits, both detached.
    """
    optimizer.zero_grad(set_to_none=True)
    loss, logits = forward_loss(model, images, labels, precision)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), logits.detach()


def forward_loss(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    precision: str,
    label_smoothing: float = 0.0,
    mixture: Mixture | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy, [], fp32, and the logits.

    A mixed image's target is `share` for its own label and 1 - `share` for the other, before smoothing.
    """
    with autocast(images.device, precision):
        logits = model(images)
    return cross_entropy(logits.float(), labels, label_smoothing, mixture), logits


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float, mixture: Mixture | None) -> Tensor:
    """Return the mean cross entropy, [], of logits, [N, classes], and labels, [N], as in `forward_loss`."""
    loss = partial(F.cross_entropy, logits, label_smoothing=label_smoothing)
    if mixture is None:
        return loss(labels)
    own, other = loss(labels, reduction="none"), loss(mixture.others, reduction="none")
    return (mixture.share * own + (1 - mixture.share) * other).mean()


class StepOutput(NamedTuple):
    """The result of a step. Reading it waits for the GPU; the next step overwrites it.

    Args:
        loss: [], fp32, mean over this process's images, with smoothed labels.
        n_correct: [], int64, number of its images classified correctly. The correct label of a mixed image is the one
            with the larger share.
    """

    loss: Tensor
    n_correct: Tensor


class TrainingStep:
    """The state of a training run: network, optimizer, schedule and averages. A call runs the next step.

        loader = Loader(dataset.train, augmentation, recipe.batch_size)
        step = TrainingStep(model, recipe, augmentation, n_steps=recipe.epochs * len(loader))
        for batch in loader.epoch(1):
            loss, n_correct = step(batch)

    Args:
        model: the network on its device, in channels_last; DistributedDataParallel for several processes. Parameters
            with `requires_grad=False` are not trained, and batch norms with such a weight stay in evaluation mode.
        recipe: optimizer, schedule, label smoothing, clipping, averaging and sizes.
        augmentation: the augmentation and normalization of the images.
        n_steps: number of steps of the whole run, which the schedule spans.
        precision: "fp32", "bf16" or "fp16".
        graph: whether to run as a CUDA graph, which needs a GPU and a single process.
        accumulate: number of micro-batches, computed one after the other, each with its own statistics.
        forward: a function that computes the logits, such as the compiled model; None: the model.
        world_size: number of processes that share a batch.
        make_graph: a function that records another as a graph.

    Raises:
        ValueError: precision is unknown; n_steps, accumulate or world_size is not a positive integer; no parameter of
            the model needs a gradient; a field of the recipe breaks its rule or needs a layer that the model lacks;
            there are more sizes than steps; or graph is set with several processes or a model on a CPU.
        TypeError: another argument has the wrong type.

    A recorded step is bit-identical to an unrecorded one. Between steps, change weights in place; do not replace them.

    A batch smaller than those before it, such as the last of an epoch, runs outside of the graph and with the
    algorithms of cuDNN's heuristic, until two batches of its size come in a row. This saves a second graph, a second
    memory pool and a search by cuDNN. Padding the batch would change its statistics. Carrying its images over to the
    next epoch would change the order and number of steps, so that old runs could not be resumed.

    Other batches run with `torch.backends.cudnn.benchmark`, unless torch or cuDNN is set to be deterministic. Each step
    restores the flag.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        augmentation: Augmentation,
        n_steps: int,
        *,
        precision: str = "fp32",
        graph: bool = False,
        accumulate: int = 1,
        forward: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
        make_graph: MakeGraph = CudaGraph,
    ) -> None:
        check_type("model", model, nn.Module)
        check_type("recipe", recipe, Recipe)
        check_type("augmentation", augmentation, Augmentation)
        check_type("graph", graph, bool)
        check_choice("precision", precision, DTYPES)
        for name, number in (("n_steps", n_steps), ("accumulate", accumulate), ("world_size", world_size)):
            check_integer(name, number, below=2**63)
        for name, function in (("forward", forward), ("make_graph", make_graph)):
            if not (callable(function) or (function is None and name == "forward")):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        for name, setting in settings_of(Recipe).items():
            setting.check(getattr(recipe, name))
        check_together(recipe)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"model must have parameters to train, {type(model).__name__} has none")
        self.model, self.recipe, self.augmentation, self.n_steps = model, recipe, augmentation, n_steps
        self.precision, self.accumulate, self.world_size = precision, accumulate, world_size
        self.forward = model if forward is None else forward
        # DistributedDataParallel exchanges gradients as backward produces them; a compiler places casts itself.
        if precision != "fp32" and forward is None and not isinstance(model, DistributedDataParallel):
            self.forward = cast_weights(model, DTYPES[precision])
        # As usual in fine-tuning, a frozen batch norm also keeps the running statistics that belong to its weights.
        self.frozen_norms = find_frozen_norms(model)
        self.optimizer = make_optimizer(model, recipe)
        self.average = Average(bare(model), recipe.ema) if recipe.ema else None
        self.lookahead = Lookahead(bare(model)) if recipe.lookahead else None
        self.sizes = Sizes(recipe.sizes, n_steps) if recipe.sizes else None
        if self.sizes is not None and len(self.sizes.sizes) > n_steps:
            raise ValueError(f"sizes must not be more than the run's {n_steps} steps, got {len(self.sizes.sizes)}")
        self.n_done = 0
        self.largest_batch, self.last_batch = 0, 0  # images
        if graph and world_size > 1:
            raise ValueError(f"graph needs a single process, got {world_size}")
        device = next(model.parameters()).device
        self.scaler = make_scaler(precision, device)
        self._n_skipped = torch.zeros((), dtype=torch.int64, device=device)
        if graph and make_graph is CudaGraph and device.type != "cuda":
            raise ValueError(f"graph needs a model on a CUDA device, got {device}")
        self.graphed: Callable[..., StepOutput] | None = None
        if graph:
            averages = [] if self.average is None else self.average.tensors()
            run: Any = weakref.WeakMethod(self._run)  # no cycle: an unused step is freed at once
            changes = (model, self.optimizer, self.scaler, self._n_skipped, *averages)
            self.graphed = graphed(lambda *batch: run()(*batch), *changes, fallback=False, make_graph=make_graph)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.recipe.lr * SCHEDULES[self.recipe.schedule](self.n_done, self.n_steps)

    @property
    def n_skipped(self) -> int:
        """Number of steps skipped since construction because gradients overflowed in fp16; waits for the GPU."""
        return int(self._n_skipped) if self.scaler.is_enabled() else 0

    def __call__(self, batch: Batch, n_images: int | None = None) -> StepOutput:
        """Run a step.

        Args:
            batch: this process's share of the batch.
            n_images: number of images in all processes' shares; None: in this one's.
        """
        for group in self.optimizer.param_groups:
            group["lr"].fill_(self.lr * group["lr_scale"])
        n_images = len(batch.plan) if n_images is None else n_images
        if not bare(self.model).training:  # after an evaluation
            self.model.train()
        for norm in self.frozen_norms:  # train() has switched them
            norm.eval()
        size = len(batch.plan)
        is_short = size < self.largest_batch and size != self.last_batch
        self.largest_batch, self.last_batch = max(size, self.largest_batch), size
        run = self._run if is_short or self.graphed is None else self.graphed
        with device_guard(batch.plan), cudnn_benchmark(not is_short):
            output = run(batch, n_images) if self.sizes is None else self._run_reduced(run, batch, n_images, self.sizes)
        self.n_done += 1
        if self.lookahead is not None:
            self.lookahead.update(self.n_done, self.n_steps)
        return output

    def _run_reduced(self, run: Callable[..., StepOutput], batch: Batch, n_images: int, sizes: Sizes) -> StepOutput:
        """Run a step on images reduced to the size scheduled for it."""
        sizes.check(*batch.images.shape[2:])
        size = sizes.at(self.n_done)
        is_new = self.n_done > 0 and size != sizes.at(self.n_done - 1)
        with fresh_statistics(self.model) if is_new else nullcontext():
            return run(batch, n_images, size)

    def _run(self, batch: Batch, n_images: int, size: int | None = None) -> StepOutput:
        self.optimizer.zero_grad(set_to_none=True)
        n_parts = count_micro_batches(n_images, self.world_size, self.accumulate)
        plans = batch.plan.tensor_split(n_parts)
        losses, correct = [], []
        for i, plan in enumerate(plans):
            images, labels, mixture = batch._replace(plan=plan).mixed(self.augmentation, DTYPES[self.precision])
            if size is not None and size != images.shape[-1]:
                images = resized(images, size)
            is_last = i == len(plans) - 1
            with nullcontext() if is_last else self._without_exchange():
                smoothing = self.recipe.label_smoothing
                loss, logits = forward_loss(self.forward, images, labels, self.precision, smoothing, mixture)
                # DistributedDataParallel averages over processes with equal weights, whatever the size of their shares.
                share = torch.full_like(loss, len(plan) * self.world_size / n_images)
                self.scaler.scale(loss).backward(share)
            losses.append(loss.detach() if n_parts == 1 else loss.detach() * (len(plan) / len(batch.plan)))
            shown = labels if mixture is None else mixture.dominant(labels)
            correct.append((logits.detach().argmax(1) == shown).sum())
        if self.recipe.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        overflow = None
        if self.scaler.is_enabled():
            overflow = has_overflowed(self.scaler, self.optimizer)
            self._n_skipped += overflow > 0
        self.scaler.update()
        if self.average is not None:
            self.average.update(overflow)
        return StepOutput(_total(losses), _total(correct))

    def _without_exchange(self) -> Any:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def averaged(self) -> dict[str, Tensor]:
        """Return the state dict to test and save: with the moving averages if there are any, else the model's own."""
        model = bare(self.model)
        return model.state_dict() if self.average is None else self.average.averaged(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer, schedule, averages and loss scale; the model has its own state dict."""
        state = {"optimizer": self.optimizer.state_dict(), "n_done": self.n_done}
        if self.average is not None:
            state["average"] = self.average.state_dict()
        if self.lookahead is not None:
            state["lookahead"] = self.lookahead.state_dict()
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state. The optimizer keeps the recipe's settings, and the scaler keeps its own.

        Raises:
            ValueError: the state belongs to another model or recipe, or its loss scale is invalid; nothing changes.
        """
        own, saved = ({**one, "optimizer": {"state": one["optimizer"]["state"]}} for one in (self.state_dict(), state))
        if unlike := first_difference(own, saved, "step"):
            raise ValueError(f"the state does not fit the model and its recipe: {unlike}")
        load_scale(self.scaler, state.get("scaler", {}))
        copy_into(own["optimizer"], saved["optimizer"])
        self.n_done = state["n_done"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.lookahead is not None:
            copy_into(own["lookahead"], saved["lookahead"])


def count_micro_batches(n_images: int, world_size: int, accumulate: int) -> int:
    """Return the number of micro-batches of a batch of `n_images`, each of at least 2 images."""
    # Synchronized batch norms meet in each one, so all processes have as many as the smallest share allows.
    return min(accumulate, max(n_images // world_size // 2, 1))


def find_frozen_norms(model: nn.Module) -> list[Any]:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.weight is not None and not norm.weight.requires_grad]


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def bare(model: nn.Module) -> nn.Module:
    """Return the model without DistributedDataParallel around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model

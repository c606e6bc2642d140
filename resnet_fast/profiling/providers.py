"""The two training steps to profile, with the same weights and images; both are checked first.

steps = checked_steps(config)   # {"eager": …, "fused": …}
steps["fused"]()                # one step on the next batch
"""

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from resnet_fast.models.registry import MODELS
from resnet_fast.ops.backend import cudnn_benchmark
from resnet_fast.profiling.check import check_first_step, check_gradients, exact_logits
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.loss_scale import make_scaler
from resnet_fast.training.optimizer import make_optimizer
from resnet_fast.training.step import training_step

N_CLASSES = 10
N_BATCHES = 4  # in rotation, so that no step finds its images in a cache


def eager(config: TrainConfig) -> nn.Module:
    return MODELS[config.model].make_plain(N_CLASSES, config.stem)


def fused(config: TrainConfig) -> nn.Module:
    return MODELS[config.model].make(N_CLASSES, config.stem)


# The first is the baseline.
PROVIDERS: Mapping[str, Callable[[TrainConfig], nn.Module]] = {"eager": eager, "fused": fused}


class Step:
    """A model, its optimizer and its batches; a call runs one training step on the next batch."""

    def __init__(self, model: nn.Module, config: TrainConfig, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.model, self.precision = model.train(), config.precision
        self.optimizer = make_optimizer(model, config)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(config.lr)
        self.scaler = make_scaler(config.precision, torch.device(config.device))
        self.batches = itertools.cycle(batches)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return the loss, [], and the logits, [N, 10]."""
        with cudnn_benchmark(True):
            return training_step(self.model, self.optimizer, *next(self.batches), self.precision, self.scaler)


def checked_steps(
    config: TrainConfig, providers: Mapping[str, Callable[[TrainConfig], nn.Module]] = PROVIDERS
) -> dict[str, Step]:
    """Return the step of every provider, all with channels_last and cudnn.benchmark, after checking its first run.

    Raises:
        ProfileError: a provider computes wrong results.
    """
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # torch requires a number here
    batches = _random_batches(config, device)
    with torch.random.fork_rng(devices=[]):  # the models are made on the CPU
        torch.manual_seed(config.seed)
        models = {name: make(config) for name, make in providers.items()}
    weights = next(iter(models.values())).state_dict()
    for model in models.values():
        model.load_state_dict(weights, strict=True)
        model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    check_gradients(models, *batches[0])
    exact = exact_logits(next(iter(models.values())), batches[0][0])

    steps = {name: Step(model, config, batches) for name, model in models.items()}
    first = {name: step() for name, step in steps.items()}
    check_first_step(first, exact, batches[0][1], models, config)
    return steps


def _random_batches(config: TrainConfig, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return random images in channels_last, not zeros, on which a processor uses less power and clocks higher."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, 3, config.image_size, config.image_size)
    batches = []
    for _ in range(N_BATCHES):
        images = torch.randn(shape, generator=generator).to(device)
        labels = torch.randint(N_CLASSES, shape[:1], generator=generator).to(device)
        batches.append((images.contiguous(memory_format=torch.channels_last), labels))
    return batches

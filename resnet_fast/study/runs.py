"""Train the networks of a study, one after the other, in the loop of `resnet-fast train`.

The training error of an epoch is, as in the paper, its running mean over the augmented training images while the
weights change. The test error uses the weights after the epoch and the running statistics, as in `train`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from resnet_fast.data import Augmentation, ImageDataset, Loader, normalize
from resnet_fast.study.gradients import gradient_norms
from resnet_fast.study.settings import Network, SkipStudy
from resnet_fast.training.background import Background
from resnet_fast.training.loop import run_epoch
from resnet_fast.training.prepare import Run, augmentation_of, torch_settings
from resnet_fast.training.processes import Processes, connect
from resnet_fast.training.random_state import seed_everything
from resnet_fast.training.reporter import Reporter
from resnet_fast.training.step import TrainingStep

GRADIENT_IMAGES = 256  # the first training images, the same for all networks


@dataclass(frozen=True)
class EpochRow:
    """A row of skip.csv: errors from 0 to 1; seconds of training only."""

    network: str
    seed: int
    epoch: int
    train_error: float
    test_error: float
    seconds: float


@dataclass(frozen=True)
class GradientRow:
    """A row of gradients.csv: the gradient norm of a convolution at the "start" or the "end" of training."""

    network: str
    seed: int
    moment: str
    layer: int
    norm: float


@dataclass(frozen=True)
class Trained:
    """The results of training one network with one seed."""

    network: Network
    seed: int
    epochs: tuple[EpochRow, ...]
    gradients: tuple[GradientRow, ...]


def run_study(study: SkipStudy, dataset: ImageDataset | None = None) -> Iterator[Trained]:
    """Train every network, seed by seed, and yield the results, so that an interrupted study has about as many of each.

    Args:
        study: the settings.
        dataset: the images, if already loaded.

    Raises:
        DataError: the images are not available.
        DivergedError: a loss became infinite or NaN.
    """
    dataset = study.load() if dataset is None else dataset
    augmentation = augmentation_of(study.config, dataset)
    with connect(study.config.device) as processes, torch_settings(study.config):
        own = dataset.to(processes.device)
        for seed in study.seeds:
            for network in study.networks:
                yield train_one(study, network, seed, own, augmentation, processes)


def train_one(
    study: SkipStudy,
    network: Network,
    seed: int,
    dataset: ImageDataset,
    augmentation: Augmentation,
    processes: Processes,
) -> Trained:
    """Train one network; `dataset` is on the device. On a CPU, the same seed gives bit-identical results."""
    config = replace(study.config, seed=seed)
    seed_everything(seed)
    model = network.build(len(dataset.classes), study.width)
    model = model.to(device=processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader = Loader(dataset.train, augmentation, config.batch_size, seed)
    n_steps = config.epochs * len(loader)
    step = TrainingStep(model, config, augmentation, n_steps, precision=config.precision, graph=config.graph)
    run = Run(config, dataset, loader, step, model, processes, Reporter(), Background())
    images, labels = next(iter(dataset.train.batches(GRADIENT_IMAGES)))
    images = normalize(images, augmentation.mean, augmentation.std)
    gradients, epochs = [], []

    def measure(moment: str) -> None:
        norms = gradient_norms(model, images, labels)
        gradients.extend(GradientRow(network.name, seed, moment, i, norm) for i, norm in enumerate(norms, 1))

    measure("start")
    for epoch in range(1, config.epochs + 1):
        metrics = run_epoch(run, epoch)
        errors = 1 - metrics.train_accuracy, 1 - metrics.test_accuracy
        epochs.append(EpochRow(network.name, seed, epoch, *errors, metrics.seconds))
    measure("end")
    return Trained(network, seed, tuple(epochs), tuple(gradients))

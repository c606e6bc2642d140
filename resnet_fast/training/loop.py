"""The training loop: SGD with Nesterov momentum, a schedule per step, an evaluation and a checkpoint per epoch.

    result = train(TrainConfig(dataset="digits"))
    result.test_accuracy, result.model, result.out

The step itself is in step.py.
"""

import dataclasses
import math
import random
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from resnet_fast.data import ImageDataset, Split, crop_and_flip, load_dataset, normalize, training_steps
from resnet_fast.training.config import MODELS, TrainConfig
from resnet_fast.training.metrics import EpochMetrics, Result
from resnet_fast.training.run_folder import RunFolder, check_is_free
from resnet_fast.training.schedule import SCHEDULES
from resnet_fast.training.step import autocast, training_step

# Reading a loss makes the program wait for the GPU: it is done every so many steps, and at the end of an epoch.
CHECK_EVERY = {"cpu": 1, "cuda": 16}


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


class Reporter:
    """Is told how a run goes. This one says nothing; the terminal output derives from it."""

    def start(self, config: TrainConfig, dataset: ImageDataset) -> None:
        """The data are loaded; training begins."""

    def start_epoch(self, epoch: int, n_steps: int) -> None:
        """An epoch of `n_steps` steps begins; the first is epoch 1."""

    def step(self, done: int, loss: float | None) -> None:
        """`done` steps of the epoch are done; now and then with their mean loss so far."""

    def end_epoch(self, metrics: EpochMetrics) -> None:
        """The epoch is trained, tested and written."""


def train(config: TrainConfig, reporter: Reporter | None = None) -> Result:
    """Train a network, write its run folder, and return what came out.

    On a CPU two calls with equal settings and equally many threads give bit-identical weights and metrics. The global
    random states of python, numpy and torch are seeded, and left as the training leaves them.

    Args:
        config: the settings; its run folder must not exist, or be empty.
        reporter: is told about every step and epoch.

    Returns:
        Result, with the accuracy of the last epoch.

    Raises:
        FileExistsError: the run folder already holds something.
        DataError: the data set is not available, or damaged.
        DivergedError: the loss became infinite or NaN; the files of the epochs before remain.
    """
    reporter = reporter or Reporter()
    check_is_free(config.out)
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # torch refuses "cuda" without a number here
        torch.backends.cudnn.benchmark = True
    dataset = load_dataset(config.dataset, config.data_dir, image_size=config.image_size, workers=config.workers)
    if config.flip is not None:
        dataset = dataclasses.replace(dataset, flip=config.flip)

    generator = seed_everything(config.seed)
    model = MODELS[config.model](num_classes=len(dataset.classes), stem=config.stem)
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, config)
    scheduler = make_scheduler(optimizer, config, training_steps(len(dataset.train), config.batch_size))
    folder = RunFolder(config, dataset)
    reporter.start(config, dataset)
    dataset = dataclasses.replace(dataset, train=dataset.train.to(device), test=dataset.test.to(device))

    history: list[EpochMetrics] = []
    begin = time.perf_counter()
    for epoch in range(1, config.epochs + 1):
        began = time.perf_counter()
        trained = train_epoch(model, dataset, optimizer, scheduler, generator, config, epoch, reporter)
        seconds = time.perf_counter() - began
        test_loss, test_accuracy = evaluate(model, dataset.test, dataset, config)
        if not math.isfinite(test_loss):
            raise DivergedError(f"the test loss became {test_loss} after epoch {epoch}")
        history.append(
            EpochMetrics(
                epoch=epoch,
                lr=trained.lr,
                train_loss=trained.loss,
                train_accuracy=trained.accuracy,
                test_loss=test_loss,
                test_accuracy=test_accuracy,
                seconds=seconds,
                images_per_second=trained.n_images / seconds,
            )
        )
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "generator": generator.get_state(),
        }
        folder.write_epoch(history, state)
        reporter.end_epoch(history[-1])
    return Result(config, tuple(history), model, time.perf_counter() - begin)


def seed_everything(seed: int) -> torch.Generator:
    """Seed the global random states, and return a generator of its own for the order and the augmentation."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """Return SGD over all parameters, in one fused pass over each."""
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,  # torch rejects nesterov without momentum
        fused=True,
    )


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> LambdaLR:
    """Return the schedule of the whole run, to be advanced after each step."""
    fraction, n_steps = SCHEDULES[config.schedule], config.epochs * steps_per_epoch
    return LambdaLR(optimizer, lambda step: fraction(step, n_steps))


class TrainedEpoch(NamedTuple):
    """The last step's learning rate, the mean loss and accuracy over the images, and how many images there were."""

    lr: float
    loss: float
    accuracy: float
    n_images: int


def train_epoch(
    model: nn.Module,
    dataset: ImageDataset,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    generator: torch.Generator,
    config: TrainConfig,
    epoch: int,
    reporter: Reporter,
) -> TrainedEpoch:
    """Run one epoch of training steps."""
    device = torch.device(config.device)
    n_steps = training_steps(len(dataset.train), config.batch_size)
    losses = torch.zeros(n_steps, device=device)
    n_correct = torch.zeros((), dtype=torch.int64, device=device)
    sizes, lr = [], 0.0
    model.train()  # the evaluation of the epoch before left it in evaluation mode
    reporter.start_epoch(epoch, n_steps)
    for step, (images, labels) in enumerate(dataset.train.batches(config.batch_size, generator)):
        images = crop_and_flip(images, dataset.crop_padding, dataset.flip, generator)
        images = normalize(images, dataset.mean, dataset.std)
        lr = optimizer.param_groups[0]["lr"]
        losses[step], logits = training_step(model, optimizer, images, labels, config.precision)
        scheduler.step()

        n_correct += (logits.argmax(1) == labels).sum()
        sizes.append(len(labels))
        done = step + 1
        if done % CHECK_EVERY[device.type] == 0 or done == n_steps:
            check_is_finite(losses[:done], epoch, config)
            reporter.step(done, float(losses[:done].mean()))
        else:
            reporter.step(done, None)
    n_images = sum(sizes)
    loss = float((losses.double().cpu() * torch.tensor(sizes)).sum()) / n_images  # the last batch may be smaller
    return TrainedEpoch(lr, loss, int(n_correct) / n_images, n_images)


def check_is_finite(losses: Tensor, epoch: int, config: TrainConfig) -> None:
    """Raise DivergedError, with the number of the first step, if a loss is infinite or NaN."""
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        step = int(bad[0])
        raise DivergedError(
            f"the loss became {float(losses[step])} at epoch {epoch}, step {step + 1}; "
            f"try a smaller learning rate than {config.lr:g}"
        )


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, dataset: ImageDataset, config: TrainConfig) -> tuple[float, float]:
    """Return the mean loss and the accuracy over all images of `split`, as they are, with the running statistics."""
    model.eval()
    total_loss = torch.zeros((), dtype=torch.float64, device=config.device)
    n_correct = torch.zeros((), dtype=torch.int64, device=config.device)
    # Without a backward to store for, twice the batch fits where training does.
    for images, labels in split.batches(2 * config.batch_size):
        with autocast(images.device, config.precision):
            logits = model(normalize(images, dataset.mean, dataset.std))
        total_loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        n_correct += (logits.argmax(1) == labels).sum()
    return float(total_loss) / len(split), int(n_correct) / len(split)

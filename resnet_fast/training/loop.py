"""The training loop: SGD with Nesterov momentum, a schedule per step, an evaluation and a checkpoint per epoch.

    result = train(TrainConfig(dataset="digits"))
    result.test_accuracy, result.model, result.out
    result = resume("runs/…")    # of a run that was stopped: the same weights, bit for bit, as if it had not been

The step itself is in step.py.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from resnet_fast.data import ImageDataset, Split, crop_and_flip, load_dataset, normalize, training_steps
from resnet_fast.training.config import MODELS, TrainConfig
from resnet_fast.training.metrics import EpochMetrics, Result
from resnet_fast.training.random_state import random_states, restore_random_states, seed_everything
from resnet_fast.training.run_folder import RunFolder, check_is_free, describe
from resnet_fast.training.saved_run import ResumeError, SavedRun, load_run
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

    def resume(self, history: Sequence[EpochMetrics]) -> None:
        """After `start`, if the run goes on from a checkpoint: the epochs that are done, which may be none or all."""

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
    check_is_free(config.out)
    return _run(config, None, reporter or Reporter())


def resume(run: SavedRun | Path | str, reporter: Reporter | None = None, **moved: Any) -> Result:
    """Go on with a run that was stopped, from its last finished epoch, to the end that it would have had.

    On a CPU, in fp32 and with as many threads as before, the weights and metrics (but for times) are bit-identical to
    those of a run that was never stopped. A run that is finished only gets its table and curves written once more.

    Args:
        run: what `load_run` returned, or the run folder, or a checkpoint in it.
        reporter: is told about every step and epoch.
        moved: data_dir, device or workers, if they are others than before, and `run` is a path.

    Returns:
        Result, of all epochs.

    Raises:
        ValueError: there is no run in that folder.
        ResumeError: its checkpoint or settings cannot be used, or the data are others than before.
        BlockingIOError: another process is at this run.
        DataError, DivergedError: as for `train`.
    """
    if not isinstance(run, SavedRun):
        run = load_run(run, **moved)
    return _run(run.config, run, reporter or Reporter())


def _run(config: TrainConfig, saved: SavedRun | None, reporter: Reporter) -> Result:
    """Train from the beginning or, if something is `saved`, from there on."""
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # torch refuses "cuda" without a number here
        torch.backends.cudnn.benchmark = True
    dataset = load_dataset(config.dataset, config.data_dir, image_size=config.image_size, workers=config.workers)
    if config.flip is not None:
        dataset = dataclasses.replace(dataset, flip=config.flip)
    if saved is not None:
        check_same_data(saved, dataset)

    generator = seed_everything(config.seed)
    model = MODELS[config.model](num_classes=len(dataset.classes), stem=config.stem)
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, config)
    scheduler = make_scheduler(optimizer, config, training_steps(len(dataset.train), config.batch_size))
    folder = RunFolder(config, dataset, keep=saved is None or saved.is_newest)
    if saved is None:
        folder.start()
    with folder.hold():
        if saved is not None:
            folder.clean()
        reporter.start(config, dataset)
        history: list[EpochMetrics] = []
        begin = time.perf_counter()
        if saved is not None and saved.checkpoint is not None:
            state = saved.checkpoint
            for name, part in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
                part.load_state_dict(state[name])
            generator.set_state(state["generator"])
            restore_random_states(state["random"], device)
            history = [EpochMetrics(**metrics) for metrics in state["history"]]
            begin -= state["seconds"]
            folder.write_tables(history)  # they may be an epoch behind
        if saved is not None:
            reporter.resume(history)
        dataset = dataclasses.replace(dataset, train=dataset.train.to(device), test=dataset.test.to(device))
        for epoch in range(len(history) + 1, config.epochs + 1):
            history.append(run_epoch(model, dataset, optimizer, scheduler, generator, config, epoch, reporter))
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "generator": generator.get_state(),
                "random": random_states(device),
                "seconds": time.perf_counter() - begin,
            }
            folder.write_epoch(history, state)
            reporter.end_epoch(history[-1])
    return Result(config, tuple(history), model.eval(), time.perf_counter() - begin)


def check_same_data(saved: SavedRun, dataset: ImageDataset) -> None:
    """Raise ResumeError if the data set is not the one that config.json describes."""
    now = json.loads(json.dumps(describe(saved.config, dataset)))  # tuples become lists, as in the file
    for name in ("classes", "train_images", "test_images", "mean", "std", "crop_padding"):
        if saved.description.get(name) != now[name]:
            raise ResumeError(
                f"the data are not those that the run began with: {name} is {now[name]}, "
                f"{saved.config.out / 'config.json'} says {saved.description.get(name)}"
            )


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


def run_epoch(
    model: nn.Module,
    dataset: ImageDataset,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    generator: torch.Generator,
    config: TrainConfig,
    epoch: int,
    reporter: Reporter,
) -> EpochMetrics:
    """Train for one epoch, then test."""
    began = time.perf_counter()
    trained = train_epoch(model, dataset, optimizer, scheduler, generator, config, epoch, reporter)
    seconds = time.perf_counter() - began
    test_loss, test_accuracy = evaluate(model, dataset.test, dataset, config)
    if not math.isfinite(test_loss):
        raise DivergedError(f"the test loss became {test_loss} after epoch {epoch}; {suspects(model, trained.lr)}")
    return EpochMetrics(
        epoch=epoch,
        lr=trained.lr,
        train_loss=trained.loss,
        train_accuracy=trained.accuracy,
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        seconds=seconds,
        images_per_second=trained.n_images / seconds,
    )


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
            check_is_finite(losses[:done], epoch, model, lr)
            reporter.step(done, float(losses[:done].mean()))
        else:
            reporter.step(done, None)
    n_images = sum(sizes)
    loss = float((losses.double().cpu() * torch.tensor(sizes)).sum()) / n_images  # the last batch may be smaller
    return TrainedEpoch(lr, loss, int(n_correct) / n_images, n_images)


def check_is_finite(losses: Tensor, epoch: int, model: nn.Module, lr: float) -> None:
    """Raise DivergedError, with the number of the first step, if a loss is infinite or NaN."""
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        step = int(bad[0])
        where = f"at epoch {epoch}, step {step + 1}"
        raise DivergedError(f"the loss became {float(losses[step])} {where}; {suspects(model, lr)}")


def suspects(model: nn.Module, lr: float) -> str:
    """Say what may have made the loss infinite or NaN.

    The running statistics come first: a forward spoils those of its first layer that is not finite and of all behind
    it, whereas one step backward spoils every weight.
    """
    text = f"suspects: the learning rate, {lr:g} there (try a smaller --lr)"
    for kind, tensors in (("running statistics", model.named_buffers()), ("weights", model.named_parameters())):
        named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
        bad = [name for name, tensor in named if not tensor.isfinite().all()]
        if bad:
            text += f"; {len(bad)} of {len(named)} {kind} are not finite, first {bad[0]}"
    return text


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

"""The training loop: an augmented step per batch, an evaluation and a checkpoint per epoch.

    result = train(TrainConfig(dataset="digits"))
    result.test_accuracy, result.model, result.out
    result = resume("runs/…")    # of a run that was stopped: the same weights, bit for bit, as if it had not been

The step itself is in step.py, evaluation in evaluation.py; under torchrun all processes run this loop together.
"""

import copy
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_fast import convert_sync_batchnorm
from resnet_fast.data import Augmentation, DataError, ImageDataset, Loader, load_dataset
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.evaluation import evaluate
from resnet_fast.training.metrics import EpochMetrics, Result
from resnet_fast.training.network import make_network, whiten_stem
from resnet_fast.training.processes import Processes, join
from resnet_fast.training.random_state import random_states, restore_random_states, seed_everything
from resnet_fast.training.run_folder import RunFolder, check_is_free, describe
from resnet_fast.training.saved_run import ResumeError, SavedRun, load_run
from resnet_fast.training.step import TrainingStep, bare

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
    random states of python, numpy and torch are seeded, and left as the training leaves them. Under torchrun every
    process calls this; the first one reports and writes.

    Args:
        config: the settings; its run folder must not exist, or be empty.
        reporter: is told about every step and epoch.

    Returns:
        Result, with the accuracy of the last epoch.

    Raises:
        FileExistsError: the run folder already holds something.
        ValueError: the settings do not suit the data or the processes.
        DataError: the data set is not available, or damaged.
        DivergedError: the loss became infinite or NaN; the files of the epochs before remain.
        OtherProcessError, LostProcessError: another process failed or ended.
    """
    return _run(config, None, reporter or Reporter())


def resume(run: SavedRun | Path | str, reporter: Reporter | None = None, **moved: Any) -> Result:
    """Go on with a run that was stopped, from its last finished epoch, to the end that it would have had.

    On a CPU, in fp32 and with as many threads and processes as before, the weights and metrics (but for times) are
    bit-identical to those of a run that was never stopped. With another number of processes the order of the images
    stays; sums are rounded differently and, without sync_bn, batch norm sees other shares. A run that is finished only
    gets its table and curves written once more.

    Args:
        run: what `load_run` returned, or the run folder, or a checkpoint in it.
        reporter: is told about every step and epoch.
        moved: data_dir, device, workers, images, graph, time_budget or tensorboard, if they are others than before,
            and `run` is a path.

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


class _Run(NamedTuple):
    """What an epoch needs."""

    config: TrainConfig
    dataset: ImageDataset
    loader: Loader
    step: TrainingStep
    tested: nn.Module
    augmentation: Augmentation
    processes: Processes
    reporter: Reporter


def _run(config: TrainConfig, saved: SavedRun | None, reporter: Reporter) -> Result:
    """Train from the beginning or, if something is `saved`, from there on."""
    with join(config.device) as processes, _settings(config, processes.device):
        return _run_joined(config, saved, reporter, processes)


def _run_joined(config: TrainConfig, saved: SavedRun | None, reporter: Reporter, processes: Processes) -> Result:
    """Do so with the other processes; with this frame all that exchanges between them is gone."""
    # Two processes may have named the folder by two seconds, or chosen two precisions on two machines.
    config = replace(processes.of_first(config), data_dir=config.data_dir, workers=config.workers)
    if saved is None:
        processes.first_only(lambda: check_is_free(config.out))
    dataset = processes.first_goes_first(lambda: _load(config))
    augmentation = augmentation_of(config, dataset)
    of_first = processes.of_first((dataset.classes, len(dataset.train), len(dataset.test), augmentation))
    processes.together(lambda: _check_data(dataset, augmentation, processes, saved, of_first))
    folder = RunFolder(config, dataset, augmentation, keep=saved is None or saved.is_newest)
    own = processes.together(lambda: _own_part(config, dataset, processes))
    run = _prepare(config, dataset, own, augmentation, processes, reporter if processes.is_first else Reporter())
    if saved is None:
        processes.first_only(folder.start)
    with processes.signals_together(), ExitStack() as stack:
        processes.first_only(lambda: stack.enter_context(folder.hold()))
        return _train(run, folder, saved)


def _load(config: TrainConfig) -> ImageDataset:
    dataset = load_dataset(config.dataset, config.data_dir, image_size=config.image_size, workers=config.workers)
    return dataset.hold_out(config.holdout) if config.holdout else dataset


def _check_data(
    dataset: ImageDataset, augmentation: Augmentation, processes: Processes, saved: SavedRun | None, of_first: tuple
) -> None:
    """Raise unless the data are the same in all processes, suffice for them and, of a resumed run, are as before."""
    if (dataset.classes, len(dataset.train), len(dataset.test), augmentation) != of_first:
        raise DataError(f"the data of process {processes.rank} are not those of process 0")
    if len(dataset.test) < processes.size:
        raise ValueError(f"each process must have an image to test, got {len(dataset.test)} for {processes.size}")
    if saved is not None:
        check_same_data(saved, dataset, augmentation)


def _own_part(config: TrainConfig, dataset: ImageDataset, processes: Processes) -> ImageDataset:
    """Return its own images to test, and all to train on, because it takes a share of every batch."""
    own = dataset
    if processes.size > 1:
        own = replace(
            dataset, test=dataset.test.subset(torch.arange(processes.rank, len(dataset.test), processes.size))
        )
    return own.to(processes.device, config.images)


def _prepare(
    config: TrainConfig,
    dataset: ImageDataset,
    own: ImageDataset,
    augmentation: Augmentation,
    processes: Processes,
    reporter: Reporter,
) -> _Run:
    """Make the network and all that trains it."""
    device, rank, size = processes.device, processes.rank, processes.size
    loader = Loader(own.train, augmentation, config.batch_size, config.seed, rank, size)
    seed_everything(config.seed)
    model = make_network(config, len(dataset.classes))
    if config.whiten:
        whiten_stem(model.conv1, dataset, augmentation.mean, augmentation.std)  # type: ignore[arg-type]
    seed_everything(config.seed, rank)  # each process draws its own dropout
    if config.sync_bn:
        convert = convert_sync_batchnorm if config.backend == "fused" else nn.SyncBatchNorm.convert_sync_batchnorm
        model = convert(model)
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = model
    if size > 1:
        trained = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        # Tested and saved are the first one's running statistics; the evaluation gives them to all, once an epoch.
        trained.broadcast_buffers = False  # an attribute, because the argument has another name in newer versions
    step = TrainingStep(
        trained,
        config,
        augmentation,
        n_steps=config.epochs * len(loader),
        precision=config.precision,
        graph=config.graph,
        accumulate=config.accumulate,
        forward=torch.compile(trained) if config.backend == "compile" else None,
        world_size=size,
    )
    tested = copy.deepcopy(model) if config.ema else model
    return _Run(config, own, loader, step, tested, augmentation, processes, reporter)


def augmentation_of(config: TrainConfig, dataset: ImageDataset) -> Augmentation:
    """Return what the recipe does to the images of this data set."""
    half = (0.5, 0.5, 0.5)
    mean, std = (dataset.mean, dataset.std) if config.normalize == "dataset" else (half, half)
    crop = dataset.crop_padding if config.crop is None else config.crop
    height, width = dataset.train.size
    if config.padding == "reflect" and crop >= min(height, width):
        raise ValueError(f"crop must be below the images' {min(height, width)} pixels to reflect, got {crop}")
    if config.cutout > min(height, width):
        raise ValueError(f"cutout must be at most the images' {min(height, width)} pixels, got {config.cutout}")
    return Augmentation(mean, std, crop, config.padding, config.flip, config.cutout)


def _train(run: _Run, folder: RunFolder, saved: SavedRun | None) -> Result:
    """Train what is left to train; test and save after every epoch."""
    config, processes, step = run.config, run.processes, run.step
    if saved is not None:
        processes.first_only(folder.clean)
    run.reporter.start(config, folder.dataset)
    history: list[EpochMetrics] = []
    start = begin = time.perf_counter()
    if saved is not None and saved.checkpoint is not None:
        history = _restore(run, saved.checkpoint)
        begin -= saved.checkpoint["seconds"]
        processes.first_only(lambda: folder.write_tables(history))  # they may be an epoch behind
    if saved is not None:
        run.reporter.resume(history)
    n_before = len(history)
    for epoch in range(n_before + 1, config.epochs + 1):
        # The first epoch always begins, of a run that goes on, too: else it would never end.
        if config.time_budget and epoch > n_before + 1:
            if processes.of_first(time.perf_counter() - start + history[-1].seconds > config.time_budget):
                processes.first_only(partial(folder.write_tables, history, is_last=True))
                break
        history.append(run_epoch(run, epoch))
        state = {
            "model": step.averaged(),
            "trained_model": bare(step.model).state_dict() if config.ema else None,
            "step": step.state_dict(),
            "random": processes.gather(random_states(processes.device)),
            "seconds": time.perf_counter() - begin,
        }
        processes.first_only(partial(folder.write_epoch, history, state))
        run.reporter.end_epoch(history[-1])
        processes.deliver_signals()
    mirrored = None
    if folder.dataset.flip:
        mirrored = evaluate(run.tested, run.dataset.test, run.augmentation, config, processes, mirror=True)[1]
    return Result(config, tuple(history), run.tested.eval(), time.perf_counter() - begin, mirrored)


def _restore(run: _Run, checkpoint: dict[str, Any]) -> list[EpochMetrics]:
    """Set the run back to the checkpoint, and return the epochs until there."""
    weights = checkpoint["trained_model"] or checkpoint["model"]
    bare(run.step.model).load_state_dict(weights)
    run.tested.load_state_dict(checkpoint["model"])
    run.step.load_state_dict(checkpoint["step"])
    history = [EpochMetrics(**metrics) for metrics in checkpoint["history"]]
    run.processes.together(partial(_check_same_epoch, len(history), run.processes.of_first(len(history))))
    run.step.n_done = len(history) * len(run.loader)  # among another number of processes it may be another
    if run.processes.rank < len(checkpoint["random"]):
        restore_random_states(checkpoint["random"][run.processes.rank], run.processes.device)
    return history


def _check_same_epoch(n_done: int, of_first: int) -> None:
    """Raise ResumeError unless all processes read the same checkpoint."""
    if n_done != of_first:
        raise ResumeError(f"this process has read a checkpoint of epoch {n_done}, the first one that of {of_first}")


@contextmanager
def _settings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """What torch is told for the length of a run."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not config.deterministic
    if not config.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch_settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch_settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch_settings.fill_uninitialized_memory = False  # every kernel here fills what it allocates
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch_settings.fill_uninitialized_memory = fill


def check_same_data(saved: SavedRun, dataset: ImageDataset, augmentation: Augmentation) -> None:
    """Raise ResumeError if the data set is not the one that config.json describes."""
    now = json.loads(json.dumps(describe(saved.config, dataset, augmentation)))  # tuples become lists, as in the file
    for name in ("classes", "train_images", "test_images", "mean", "std", "crop"):
        if saved.description.get(name) != now[name]:
            raise ResumeError(
                f"the data are not those that the run began with: {name} is {now[name]}, "
                f"{saved.config.out / 'config.json'} says {saved.description.get(name)}"
            )


def run_epoch(run: _Run, epoch: int) -> EpochMetrics:
    """Train for one epoch, then test."""
    began = time.perf_counter()
    trained = train_epoch(run, epoch)
    seconds = time.perf_counter() - began
    if run.config.ema:
        run.tested.load_state_dict(run.step.averaged())
    test_loss, test_accuracy = evaluate(run.tested, run.dataset.test, run.augmentation, run.config, run.processes)
    if not math.isfinite(test_loss):
        raise DivergedError(f"the test loss became {test_loss} after epoch {epoch}; {suspects(run.tested, trained.lr)}")
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


def train_epoch(run: _Run, epoch: int) -> TrainedEpoch:
    """Run one epoch of training steps."""
    step, processes, reporter = run.step, run.processes, run.reporter
    device = processes.device
    sizes = torch.tensor(run.loader.batch_sizes(), dtype=torch.float64)
    losses = torch.zeros(len(sizes), device=device)  # of this process, in parts of the mean over all of them
    n_correct = torch.zeros((), dtype=torch.int64, device=device)
    lr, checked, total_loss = 0.0, 0, 0.0
    step.model.train()  # the evaluation of the epoch before left it in evaluation mode
    reporter.start_epoch(epoch, len(sizes))
    for i, batch in enumerate(run.loader.epoch(epoch)):
        lr = step.lr
        size = int(sizes[i])
        output = step(batch, size)
        torch.mul(output.loss, len(batch.plan) / size, out=losses[i])
        n_correct += output.n_correct
        done = i + 1
        if done % CHECK_EVERY[device.type] == 0 or done == len(sizes):
            of_all = processes.sum(losses[checked:done]).double().cpu()
            check_is_finite(of_all, epoch, checked, step.model, lr)
            total_loss += float((of_all * sizes[checked:done]).sum())
            checked = done
            reporter.step(done, total_loss / float(sizes[:done].sum()))
            processes.deliver_signals()
        else:
            reporter.step(done, None)
    n_images = int(sizes.sum())
    return TrainedEpoch(lr, total_loss / n_images, int(processes.sum(n_correct)) / n_images, n_images)


def check_is_finite(losses: Tensor, epoch: int, n_before: int, model: nn.Module, lr: float) -> None:
    """Raise DivergedError, with the number of the first step, if a loss is infinite or NaN.

    Args:
        losses: of the steps after the first `n_before`.
    """
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        step = int(bad[0])
        where = f"at epoch {epoch}, step {n_before + step + 1}"
        raise DivergedError(f"the loss became {float(losses[step])} {where}; {suspects(bare(model), lr)}")


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

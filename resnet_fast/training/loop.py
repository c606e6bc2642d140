"""The training loop: one step per batch, one evaluation and one checkpoint per epoch.

    result = train(TrainConfig(dataset="digits"))
    result.test_accuracy, result.model, result.out
    result = resume("runs/…")    # finishes an interrupted run

The step is in step.py, the evaluation in evaluation.py. Under torchrun, all processes run this loop together.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from resnet_fast.common.checks import check_type, one_line
from resnet_fast.evaluation import predict_split
from resnet_fast.training.checkpoint import to_host
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.divergence import DivergedError, check_is_finite, suspects
from resnet_fast.training.evaluation import evaluate
from resnet_fast.training.metrics import EpochMetrics, Result
from resnet_fast.training.paths import check_is_free
from resnet_fast.training.prepare import Run, augmentation_of, check_data, load, own_part, prepare, torch_settings
from resnet_fast.training.processes import Processes, connect
from resnet_fast.training.random_state import random_states, restore_random_states
from resnet_fast.training.reporter import EpochProgress, Reporter
from resnet_fast.training.run_folder import RunFolder
from resnet_fast.training.saved_run import ResumeError, SavedRun, load_run
from resnet_fast.training.step import bare
from resnet_fast.training.structure import first_difference
from resnet_fast.training.tensorboard import need_tensorboard
from resnet_fast.training.weights import weights_file
from resnet_fast.training.weights_and_biases import WeightsAndBiases, need_wandb

# Steps between two readings of the losses, each of which waits for the GPU; the end of an epoch reads them, too.
CHECK_EVERY = {"cpu": 1, "cuda": 16}


def train(config: TrainConfig, reporter: Reporter | None = None) -> Result:
    """Train a network, write its run folder, and return the result.

    On a CPU, two calls with equal settings and the same number of threads give bit-identical weights and metrics
    (except times). The global random states of Python, NumPy and torch are seeded, and not restored. Under torchrun,
    call this in every process; the first one reports and writes.

    Args:
        config: the settings; the run folder `config.out` must be new or empty.
        reporter: receives the progress of the run; None: nothing is reported.

    Returns:
        The result, with the accuracy after the last epoch.

    Raises:
        FileExistsError: the run folder is not empty, or another process writes to it.
        ValueError: the settings do not suit the data or the processes.
        TypeError: an argument has the wrong type.
        TensorBoardError, WandbError: `tensorboard` or `wandb` is set and not installed, or W&B has no login.
        DataError: the data set is unavailable or damaged.
        CheckpointMismatch, CheckpointError: `weights` belongs to another network or is damaged; nothing is written.
        DivergedError: the loss became infinite or NaN; the files of earlier epochs remain.
        OtherProcessError, LostProcessError: another process failed or ended.
    """
    check_type("config", config, TrainConfig)
    return _run(config, None, reporter)


def resume(run: SavedRun | Path | str, reporter: Reporter | None = None, **moved: Any) -> Result:
    """Resume an interrupted run from its last finished epoch, and train it to its end.

    On a CPU in fp32, with the same number of threads and processes, the weights and metrics (except times) are
    bit-identical to those of an uninterrupted run. With another number of processes, the order of the images is
    unchanged, but sums are rounded differently and, without sync_bn, batch norm sees other shares of a batch. For a
    finished run, only its table and pictures are written again.

    Args:
        run: a run folder, a checkpoint in it, or the result of `load_run`.
        reporter: receives the progress of the run; None: nothing is reported.
        moved: new values for data_dir, mirror, device, workers, images, graph, time_budget, tensorboard or wandb;
            allowed if `run` is a path.

    Returns:
        The result, with all epochs of the run.

    Raises:
        ValueError: `run` is neither a run folder nor in one, or a value of `moved` breaks its rule.
        ResumeError: the checkpoint or the settings cannot be used, or the data differ from before.
        BlockingIOError: another process writes to this run.
        DataError, DivergedError and others: as for `train`.
    """
    check_type("run", run, SavedRun, str, PathLike)
    if not isinstance(run, SavedRun):
        run = load_run(run, **moved)
    elif moved:
        raise ValueError(f"run must be a path if settings change, got a SavedRun and {', '.join(moved)}")
    return _run(run.config, run, reporter)


def _run(config: TrainConfig, saved: SavedRun | None, reporter: Reporter | None) -> Result:
    """Train from the beginning, or from `saved` if it is given."""
    check_type("reporter", reporter, Reporter, type(None))
    with connect(config.device) as processes, torch_settings(config):
        return _run_connected(config, saved, reporter or Reporter(), processes)


def _run_connected(config: TrainConfig, saved: SavedRun | None, reporter: Reporter, processes: Processes) -> Result:
    """Train with the other processes; this frame owns all that communicates, which must be freed before they part."""
    # Processes may have named the folder in different seconds, or chosen different precisions on different machines.
    config = replace(processes.broadcast(config), data_dir=config.data_dir, workers=config.workers)
    if config.tensorboard:
        need_tensorboard()
    if config.wandb:
        processes.first_only(need_wandb)
    if saved is None:
        processes.first_only(lambda: check_is_free(config.out))
        if config.weights is not None:
            processes.first_only(partial(weights_file, config.weights))  # before data are downloaded
    dataset = processes.first_goes_first(lambda: load(config))
    augmentation = augmentation_of(config, dataset)
    expected = processes.broadcast((dataset.classes, len(dataset.train), len(dataset.test), augmentation))
    processes.together(lambda: check_data(dataset, augmentation, processes, saved, expected))
    folder = RunFolder(config, dataset, augmentation, keep=saved is None or saved.is_newest)
    own = processes.together(lambda: own_part(config, dataset, processes))
    reporter = reporter if processes.is_first else Reporter()
    run = prepare(config, dataset, own, augmentation, processes, reporter, saved)
    with processes.signals_together(), ExitStack() as stack:
        processes.first_only(lambda: stack.enter_context(folder.hold(is_new=saved is None)))
        if saved is None:
            # Checks again, now that the folder is held, that it is empty.
            processes.first_only(partial(folder.start, run.origin and run.origin.sha256))
        if config.wandb and processes.is_first:
            board = WeightsAndBiases(run.reporter, config)
            stack.push(board.close)
            run = run._replace(reporter=board)
        return _train(run, folder, saved)


def _train(run: Run, folder: RunFolder, saved: SavedRun | None) -> Result:
    """Train the remaining epochs and test after each; a thread writes an epoch's files while the next one trains."""
    config, processes, step = run.config, run.processes, run.step
    checkpoint = None if saved is None else saved.checkpoint
    history = [] if checkpoint is None else _restore(run, checkpoint)
    if saved is not None:
        processes.first_only(folder.clean)
    if run.origin is not None:
        run.reporter.note(str(run.origin))
    run.reporter.start(config, folder.dataset)
    start = begin = time.perf_counter()
    if checkpoint is not None:
        begin -= checkpoint["seconds"]
        processes.first_only(lambda: folder.write_tables(history))  # they may be an epoch behind
    if saved is not None:
        run.reporter.resume(history)
    n_before, epoch_seconds = len(history), 0.0
    with run.writing as writing:
        for epoch in range(n_before + 1, config.epochs + 1):
            # Even a resumed run trains at least one epoch; otherwise it might never finish.
            if config.time_budget and epoch > n_before + 1:
                if processes.broadcast(time.perf_counter() - start + epoch_seconds > config.time_budget):
                    break
            began = time.perf_counter()
            history.append(run_epoch(run, epoch))
            state = {
                "model": run.tested.state_dict(),
                "trained_model": bare(step.model).state_dict() if config.ema else None,
                "step": step.state_dict(),
                "random": processes.gather(random_states(processes.device)),
                "seconds": time.perf_counter() - begin,
            }
            processes.first_only(partial(_start_writing, run, folder, tuple(history), state))
            processes.deliver_signals()
            epoch_seconds = time.perf_counter() - began
        processes.first_only(writing.finish)
    if len(history) < config.epochs:
        processes.first_only(partial(folder.write_tables, history, is_last=True))
    mirrored = processes.first_only(partial(_end, run, folder))
    return Result(config, tuple(history), run.tested.eval(), time.perf_counter() - begin, mirrored)


def _start_writing(run: Run, folder: RunFolder, history: Sequence[EpochMetrics], state: dict[str, Any]) -> None:
    """Copy the state and have a thread write it after the previous epoch; report the epoch once it is written."""
    write = partial(folder.write_epoch, history, to_host(state))
    run.writing.start(write, then=partial(run.reporter.end_epoch, history[-1]))


def _end(run: Run, folder: RunFolder) -> float | None:
    """Draw the network's errors; return its accuracy with mirror images, None if these may show another class."""
    test = run.dataset.test
    if run.processes.size > 1:
        test = folder.dataset.test.to(run.processes.device, run.config.images)
    predictions = predict_split(
        run.tested,
        test,
        folder.augmentation.mean,
        folder.augmentation.std,
        batch_size=2 * run.config.batch_size,
        precision=run.config.precision,
        flip=folder.dataset.flip and run.config.flip != "none",
    )
    folder.write_end(predictions)
    return predictions.flip_accuracy


def _restore(run: Run, checkpoint: dict[str, Any]) -> list[EpochMetrics]:
    """Restore the run from the checkpoint, and return its finished epochs."""
    run.processes.together(partial(_set_back, run, checkpoint))
    history = [EpochMetrics(**metrics) for metrics in checkpoint["history"]]
    run.processes.together(partial(_check_same_epoch, len(history), run.processes.broadcast(len(history))))
    run.step.n_done = len(history) * len(run.loader)  # steps per epoch may depend on the number of processes
    return history


def _set_back(run: Run, checkpoint: dict[str, Any]) -> None:
    """Load the checkpoint; raise ResumeError if it does not fit the network, the optimizer or the generators."""
    trained = bare(run.step.model)
    own = {"model": run.tested.state_dict(), "trained_model": trained.state_dict() if run.config.ema else None}
    unlike = first_difference(own, {name: checkpoint[name] for name in own}, "checkpoint")
    try:
        if unlike:
            raise ValueError(unlike)
        run.step.load_state_dict(checkpoint["step"])
        trained.load_state_dict(checkpoint["trained_model"] or checkpoint["model"])
        run.tested.load_state_dict(checkpoint["model"])
        if run.processes.rank < len(checkpoint["random"]):
            restore_random_states(checkpoint["random"][run.processes.rank], run.processes.device)
    except Exception as error:  # Python, NumPy and torch raise different errors for an invalid state
        raise ResumeError(f"the checkpoint in {run.config.out} does not fit its settings: {one_line(error)}") from error


def _check_same_epoch(n_done: int, expected: int) -> None:
    """Raise ResumeError unless all processes read the same checkpoint."""
    if n_done != expected:
        raise ResumeError(f"all processes must read the same checkpoint, got epoch {n_done}, the first one {expected}")


def run_epoch(run: Run, epoch: int) -> EpochMetrics:
    """Train for one epoch, then test."""
    skipped_before = run.step.n_skipped
    began = time.perf_counter()
    lr, trained = train_epoch(run, epoch)
    seconds = time.perf_counter() - began
    if run.config.ema:
        run.tested.load_state_dict(run.step.averaged())
    test_loss, test_accuracy = evaluate(
        run.tested,
        run.dataset.test,
        run.loader.augmentation,
        batch_size=2 * run.config.batch_size,  # twice the batch fits, as no backward needs activations
        precision=run.config.precision,
        processes=run.processes,
    )
    if not math.isfinite(test_loss):
        causes = suspects(run.tested, lr, run.config.precision, _muon_lr(run))
        raise DivergedError(f"the test loss became {test_loss} after epoch {epoch}; {causes}")
    return EpochMetrics(
        epoch=epoch,
        lr=lr,
        train_loss=trained.loss,
        train_accuracy=trained.accuracy,
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        seconds=seconds,
        images_per_second=sum(run.loader.batch_sizes()) / seconds,
        skipped_steps=run.step.n_skipped - skipped_before,
    )


def _muon_lr(run: Run) -> float | None:
    return run.config.muon_lr if run.config.optimizer == "muon" else None


def train_epoch(run: Run, epoch: int) -> tuple[float, EpochProgress]:
    """Run one epoch of training steps; return the last step's learning rate and the progress of all."""
    step, processes, reporter = run.step, run.processes, run.reporter
    device = processes.device
    batch_sizes = run.loader.batch_sizes()
    sizes = torch.tensor(batch_sizes, dtype=torch.float64)
    losses = torch.zeros(len(sizes), device=device)  # this process's part of each step's mean
    n_correct = torch.zeros((), dtype=torch.int64, device=device)
    lr, checked, total_loss, progress = 0.0, 0, 0.0, EpochProgress(0.0, 0.0, 0.0)
    began = time.perf_counter()
    reporter.start_epoch(epoch, len(sizes))
    for i, (batch, size) in enumerate(zip(run.loader.epoch(epoch), batch_sizes, strict=True)):
        lr = step.lr
        output = step(batch, size)
        torch.mul(output.loss, len(batch.plan) / size, out=losses[i])
        n_correct += output.n_correct
        done = i + 1
        if done % CHECK_EVERY[device.type] == 0 or done == len(sizes):
            global_losses = processes.sum(losses[checked:done]).double().cpu()
            check_is_finite(global_losses, epoch, checked, step.model, lr, step.precision, _muon_lr(run))
            total_loss += float((global_losses * sizes[checked:done]).sum())
            checked, n_images = done, float(sizes[:done].sum())
            accuracy = int(processes.sum(n_correct)) / n_images
            seconds = max(time.perf_counter() - began, 1e-9)
            progress = EpochProgress(total_loss / n_images, accuracy, n_images / seconds)
            reporter.step(done, progress)
            run.writing.poll()
            processes.deliver_signals()
        else:
            reporter.step(done, None)
    return lr, progress

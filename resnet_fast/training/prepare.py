"""Prepare what the epochs of a run need, from its settings: data, network, step, and torch's global settings."""

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnet_fast.common.checks import difference
from resnet_fast.data import Augmentation, DataError, ImageDataset, Loader, load_dataset
from resnet_fast.models.registry import MODELS
from resnet_fast.nn import convert_sync_batchnorm
from resnet_fast.training.background import Background
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.network import freeze, make_network, whiten_stem
from resnet_fast.training.processes import Processes
from resnet_fast.training.random_state import seed_everything
from resnet_fast.training.reporter import Reporter
from resnet_fast.training.resizing import Sizes
from resnet_fast.training.run_folder import run_settings
from resnet_fast.training.saved_run import ResumeError, SavedRun
from resnet_fast.training.step import TrainingStep, count_micro_batches, find_frozen_norms
from resnet_fast.training.weights import Origin, load_weights


class Run(NamedTuple):
    """The objects that an epoch needs; `writing` writes its files, `origin` is the source of loaded initial weights."""

    config: TrainConfig
    dataset: ImageDataset
    loader: Loader
    step: TrainingStep
    tested: nn.Module
    processes: Processes
    reporter: Reporter
    writing: Background
    origin: Origin | None = None


def load(config: TrainConfig) -> ImageDataset:
    dataset = load_dataset(
        config.dataset,
        config.data_dir,
        image_size=config.image_size,
        workers=config.workers,
        skip_unreadable=config.skip_unreadable,
        mirror=config.mirror,
    )
    return dataset.hold_out(config.holdout) if config.holdout else dataset


def check_data(
    dataset: ImageDataset, augmentation: Augmentation, processes: Processes, saved: SavedRun | None, expected: tuple
) -> None:
    """Raise unless all processes have the same data, enough for each, and a resumed run has the same data as before."""
    if (dataset.classes, len(dataset.train), len(dataset.test), augmentation) != expected:
        raise DataError(f"the data of process {processes.rank} differ from those of process 0")
    if len(dataset.test) < processes.size:
        raise ValueError(f"each process needs a test image, got {len(dataset.test)} for {processes.size} processes")
    if saved is not None:
        check_same_data(saved, dataset, augmentation)


def own_part(config: TrainConfig, dataset: ImageDataset, processes: Processes) -> ImageDataset:
    """Return this process's share of the test images, and all training images, for its share of every batch."""
    own = dataset
    if processes.size > 1:
        own = replace(
            dataset, test=dataset.test.subset(torch.arange(processes.rank, len(dataset.test), processes.size))
        )
    return own.to(processes.device, config.images)


def prepare(
    config: TrainConfig,
    dataset: ImageDataset,
    own: ImageDataset,
    augmentation: Augmentation,
    processes: Processes,
    reporter: Reporter,
    saved: SavedRun | None,
) -> Run:
    """Create the network and everything that trains it."""
    device, rank, size = processes.device, processes.rank, processes.size
    loader = Loader(own.train, augmentation, config.batch_size, config.seed, rank, size)
    seed_everything(config.seed)
    model = make_network(config, len(dataset.classes))
    if config.whiten:
        whiten_stem(model.conv1, dataset, augmentation.mean, augmentation.std)  # type: ignore[arg-type]
    origin = None
    if config.weights is not None and (saved is None or saved.checkpoint is None):
        # DistributedDataParallel copies them to the other processes.
        origin = processes.first_only(partial(first_weights, model, config, saved))
    seed_everything(config.seed, rank)  # each process draws its own dropout
    if config.sync_bn:
        convert = convert_sync_batchnorm if config.backend == "fused" else nn.SyncBatchNorm.convert_sync_batchnorm
        model = convert(model)
    if config.freeze:
        freeze(model, config.freeze, MODELS[config.model].stages)
    if config.ghost_batch_size:
        check_ghost_batches(model, config, loader)
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = model
    if size > 1:
        trained = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        # The first process's running statistics are tested and saved; the evaluation copies them to all, once an epoch.
        trained.broadcast_buffers = False  # the argument has another name in newer versions of torch
    step = TrainingStep(
        trained,
        config,
        augmentation,
        n_steps=config.epochs * len(loader),
        precision=config.precision,
        graph=config.graph,
        accumulate=config.accumulate,
        forward=torch.compile(trained, dynamic=False) if config.backend == "compile" else None,
        world_size=size,
    )
    tested = copy.deepcopy(model) if config.ema else model
    return Run(config, own, loader, step, tested, processes, reporter, Background(), origin)


def check_ghost_batches(model: nn.Module, config: TrainConfig, loader: Loader) -> None:
    """Raise ValueError if a step leaves a ghost batch of one image and the last maps are 1x1: no variance."""
    for step, batch_size in enumerate(loader.batch_sizes()):  # noqa: B007 (used after the loop)
        n_forwards = loader.world_size * count_micro_batches(batch_size, loader.world_size, config.accumulate)
        n_images = batch_size // n_forwards  # or one more, with a rest
        n_images += n_images % config.ghost_batch_size != 1 and batch_size % n_forwards > 0
        if n_images % config.ghost_batch_size == 1:
            break
    else:
        return
    # Sizes ascend, so no later step has smaller maps.
    height, width = loader.split.size
    if config.sizes:
        height = width = Sizes(config.sizes, config.epochs * len(loader)).at(step)
    model = copy.deepcopy(model).to("meta").train()
    for norm in find_frozen_norms(model):
        norm.eval()
    try:
        model(torch.empty(1, 3, height, width, device="meta"))
    except ValueError as error:
        raise ValueError(
            "ghost_batch_size must not leave a ghost batch of 1 image where the last maps are 1x1 "
            f"(images of {height}x{width}, stem {config.stem}), got {config.ghost_batch_size} "
            f"for {n_images} images of a batch of {batch_size}"
        ) from error


def first_weights(model: nn.Module, config: TrainConfig, saved: SavedRun | None) -> Origin:
    """Load the initial weights; raise ResumeError if a resumed run started from others, or they are missing."""
    assert config.weights is not None
    try:
        origin = load_weights(model, config.weights, config.model, config.new_head)
    except ValueError as error:
        if saved is None:
            raise
        raise ResumeError(
            f"{config.out} has finished no epoch, so it needs the weights that it started from: {error}; "
            "put them back or start a new run"
        ) from error
    if saved is not None and saved.description.get("weights_sha256") != origin.sha256:
        raise ResumeError(f"{origin.path} does not hold the weights that the run began with: its SHA-256 differs")
    return origin


def augmentation_of(config: TrainConfig, dataset: ImageDataset) -> Augmentation:
    """Return the recipe's augmentation of this data set; raise ValueError if it does not suit the images' size."""
    half = (0.5, 0.5, 0.5)
    mean, std = (dataset.mean, dataset.std) if config.normalize == "dataset" else (half, half)
    crop = dataset.crop_padding if config.crop is None else config.crop
    height, width = dataset.train.size
    if crop >= min(height, width):
        raise ValueError(f"crop must be below the images' {min(height, width)} pixels, got {crop}")
    if config.cutout >= min(height, width):
        raise ValueError(f"cutout must be below the images' {min(height, width)} pixels, got {config.cutout}")
    if config.sizes:
        Sizes(config.sizes, 1).check(height, width)
    same = ("padding", "flip", "cutout", "trivial_augment", "random_erasing", "mixup", "cutmix")
    return Augmentation(mean, std, crop, **{name: getattr(config, name) for name in same})


@contextmanager
def torch_settings(config: TrainConfig) -> Iterator[None]:
    """Apply the run's setting `deterministic` to torch within the block."""
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
        # Not needed: the kernels here write everything that they allocate.
        deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = fill


def check_same_data(saved: SavedRun, dataset: ImageDataset, augmentation: Augmentation) -> None:
    """Raise ResumeError if the data set is not the one that config.json describes."""
    # Through JSON, as in the file: tuples become lists.
    now = json.loads(json.dumps(run_settings(saved.config, dataset, augmentation)))
    path = saved.config.out / "config.json"
    before = saved.description
    if unlike := difference(now["classes"], before["classes"], "the data set", "config.json"):
        raise ResumeError(f"the data are not those that the run began with: in the classes, {unlike}; see {path}")
    for name in ("train_images", "test_images", "mean", "std", "crop"):
        if before[name] != now[name]:
            raise ResumeError(
                f"the data are not those that the run began with: {name} is {now[name]}, {path} says {before[name]}"
            )

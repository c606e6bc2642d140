"""Workers that read a folder persist between epochs, do not change a bit of any image, and end with the run."""

import copy
import gc
import pickle
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from test_data_folder import write_images
from tiny_run import config_for, equal, use_tiny

from resnet_fast.data import Augmentation, Batch, Loader, load_dataset
from resnet_fast.data.folder import FolderSplit
from resnet_fast.training import EpochMetrics, Reporter, prepare, resume, train

pytestmark = pytest.mark.usefixtures("one_thread")
N_WORKERS, HALF = 2, (0.5, 0.5, 0.5)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for part, count in (("train", 9), ("test", 3)):
        for seed, name in enumerate(("cat", "dog")):
            write_images(tmp_path / "images" / part / name, count, size=(8, 8), seed=seed)
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    assert not active_children()
    yield
    assert not active_children()


def split_of(images: Path, workers: int = N_WORKERS) -> FolderSplit:
    split = load_dataset("folder", images, image_size=8, workers=workers).train.to(torch.device("cpu"), "stream")
    assert isinstance(split, FolderSplit)
    return split


def loader_of(split: FolderSplit) -> Loader:
    return Loader(split, Augmentation(HALF, HALF, crop=1), batch_size=4, seed=1)


def assert_equal(batches: list[Batch], expected: list[Batch]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        assert all(torch.equal(*parts) for parts in zip(batch[:3], other[:3], strict=True))


def readers() -> set[int | None]:
    return {child.pid for child in active_children()}


def test_they_stay_over_epochs_and_read_what_one_process_reads(images: Path):
    split, alone = split_of(images), loader_of(split_of(images, 0))
    loader, seen = loader_of(split), []
    for epoch in (1, 2, 3):
        assert_equal(list(loader.epoch(epoch)), list(alone.epoch(epoch)))
        seen.append(readers())
    assert len(seen[0]) == N_WORKERS and seen[0] == seen[1] == seen[2]


def test_an_epoch_that_is_left_early_does_not_show_in_the_next(images: Path):
    loader, alone = loader_of(split_of(images)), loader_of(split_of(images, 0))
    next(iter(loader.epoch(1)))
    assert_equal(list(loader.epoch(2)), list(alone.epoch(2)))


def test_two_epochs_at_once_do_not_mix(images: Path):
    loader, alone = loader_of(split_of(images)), loader_of(split_of(images, 0))
    both = list(zip(loader.epoch(1), loader.epoch(2), strict=True))
    for i, epoch in enumerate((1, 2)):
        assert_equal([pair[i] for pair in both], list(alone.epoch(epoch)))
    assert len(readers()) == N_WORKERS  # those of the other one are gone


def test_a_copy_of_a_split_has_processes_of_its_own(images: Path):
    split = split_of(images)
    expected = list(loader_of(split).epoch(1))
    for other in (copy.deepcopy(split), pickle.loads(pickle.dumps(split))):
        assert_equal(list(loader_of(other).epoch(1)), expected)


def test_they_end_at_once_where_the_garbage_collector_ends_them(images: Path):
    split = split_of(images)
    list(loader_of(split).epoch(1))
    object.__setattr__(split, "itself", split)
    del split
    began = time.monotonic()
    gc.collect()
    assert time.monotonic() - began < 4  # torch waits five seconds for each that does not


@pytest.mark.slow  # torch looks every five seconds whether one has died
def test_one_that_dies_ends_the_epoch_and_not_the_next(images: Path):
    loader = loader_of(split_of(images))
    expected = list(loader.epoch(1))
    for child in active_children():
        child.kill()
        child.join()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(loader.epoch(1))
    assert_equal(list(loader.epoch(1)), expected)


class Readers(Reporter):
    """Notes who reads, and stops in the third epoch of the first run."""

    def __init__(self) -> None:
        self.seen: list[set[int | None]] = []
        self.stops = True

    def end_epoch(self, metrics: EpochMetrics) -> None:
        self.seen.append(readers())

    def start_epoch(self, epoch: int, n_steps: int) -> None:
        if epoch == 3 and self.stops:
            self.stops = False
            raise KeyboardInterrupt


def test_a_run_is_resumed_to_the_bits_of_one_without_them(images: Path, tmp_path: Path):
    load = prepare.load_dataset
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny(monkeypatch.setattr)
        monkeypatch.setattr(prepare, "load_dataset", load)
        settings = {"dataset": "folder", "data_dir": images, "images": "stream", "image_size": 8}
        straight = train(config_for(tmp_path / "straight", workers=0, **settings))
        reporter = Readers()
        with pytest.raises(KeyboardInterrupt) as stopped:
            train(config_for(tmp_path / "run", workers=N_WORKERS, **settings), reporter)
        assert reporter.seen[0] == reporter.seen[1]
        assert len(reporter.seen[0]) == N_WORKERS + 1  # the test images are a single batch
        # While `stopped` keeps the first run's data, and with them those that read, alive.
        assert readers() == reporter.seen[0]
        result = resume(tmp_path / "run", reporter)
        del stopped
    states = [torch.load(run.out / "checkpoint.pt", weights_only=True) for run in (result, straight)]
    assert all(equal(*(state[part] for state in states)) for part in ("epoch", "model", "step", "random"))

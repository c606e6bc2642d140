"""A folder of images: what is read, and the errors of a folder that cannot be used."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_fast.data import Augmentation, Batch, DataError, Loader, TensorSplit, folder, load_dataset
from resnet_fast.data.folder import FolderSplit

CPU = torch.device("cpu")


def write_images(path: Path, count: int, size: tuple[int, int] = (10, 12), seed: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    for i in range(count):
        Image.fromarray(random.randint(0, 256, (*size, 3), dtype=np.uint8)).save(path / f"{i}.png")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for part, count in (("train", 5), ("test", 2)):
        for seed, name in enumerate(("cat", "dog")):
            write_images(root / part / name, count, seed=seed)
    return root


def test_sizes_classes_and_types(images: Path):
    dataset = load_dataset("folder", images, image_size=16)
    assert (len(dataset.train), len(dataset.test)) == (10, 4)
    assert dataset.classes == ("cat", "dog")
    batches = list(dataset.test.batches(3))
    assert [tuple(x.shape) for x, _ in batches] == [(3, 3, 16, 16), (1, 3, 16, 16)]
    assert batches[0][0].dtype == torch.uint8
    assert torch.cat([y for _, y in batches]).tolist() == [0, 0, 1, 1]


def test_an_image_of_the_right_size_is_not_changed(tmp_path: Path):
    for part in ("train", "test"):
        for name in ("one", "two"):
            write_images(tmp_path / part / name, 2, size=(16, 16))
    pixels, _ = next(load_dataset("folder", tmp_path, image_size=16).test.batches(1))
    with Image.open(tmp_path / "test" / "one" / "0.png") as image:
        assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), np.asarray(image))


def epoch_of(split: FolderSplit | TensorSplit, epoch: int = 1) -> list[Batch]:
    return list(Loader(split, Augmentation((0.5,) * 3, (0.5,) * 3, crop=1), batch_size=4, seed=1).epoch(epoch))


def labels_of(batches: list[Batch]) -> list[int]:
    return torch.cat([labels[plan[:, 0]] for _, labels, plan, _ in batches]).tolist()


def test_workers_change_neither_order_nor_pixels(images: Path):
    results = [
        epoch_of(load_dataset("folder", images, image_size=16, workers=workers).train.to(CPU, "stream"))
        for workers in (0, 2)
    ]
    for batch, other in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch[:3], other[:3], strict=True))


def test_training_is_shuffled_anew(images: Path):
    split = load_dataset("folder", images, image_size=16).train.to(CPU, "stream")
    first, second = labels_of(epoch_of(split, 1)), labels_of(epoch_of(split, 2))
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("workers", [0, 1])
def test_a_streamed_epoch_is_the_one_in_memory(workers: int, images: Path):
    """Image by image; where the images lie in the batch is the plan's affair."""
    train = load_dataset("folder", images, image_size=16, workers=workers).train
    streamed, in_memory = epoch_of(train.to(CPU, "stream")), epoch_of(train.to(CPU, "memory"))
    for batch, other in zip(streamed, in_memory, strict=True):
        assert len(batch.images) == len(batch.plan) < len(other.images)
        for part in ("images", "labels"):
            taken, expected = (getattr(b, part)[b.plan[:, 0]] for b in (batch, other))
            assert torch.equal(taken, expected)
        assert torch.equal(batch.plan[:, 1:], other.plan[:, 1:])
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert all(batch.images is in_memory[0].images for batch in in_memory)


@pytest.mark.parametrize(("budget", "kept"), [(10 * 3 * 16 * 16, True), (10 * 3 * 16 * 16 - 1, False)])
def test_images_are_kept_where_they_fit(budget: int, kept: bool, images: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder, "MEMORY_BUDGET", budget)
    split = load_dataset("folder", images, image_size=16).train.to(CPU)
    assert isinstance(split, TensorSplit if kept else FolderSplit)


def test_a_subset_has_these_images(images: Path):
    train = load_dataset("folder", images, image_size=16).train
    every, labels = next(train.batches(10))
    some, of_some = next(train.subset(torch.tensor([7, 2])).batches(10))
    assert torch.equal(some, every[[7, 2]]) and torch.equal(of_some, labels[[7, 2]])


def test_the_loader_leaves_the_global_random_state(images: Path):
    split = load_dataset("folder", images, image_size=16).train.to(CPU, "stream")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch_of(split)
    assert torch.equal(torch.get_rng_state(), before)


def test_mean_and_std_are_those_of_the_training_images(images: Path):
    dataset = load_dataset("folder", images, image_size=16)
    pixels = torch.cat([x for x, _ in dataset.train.batches(4)]).double() / 255
    assert dataset.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert dataset.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


def test_mean_and_std_of_a_large_folder_come_from_evenly_spaced_images(images: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder, "STATISTICS_IMAGES", 4)
    dataset = load_dataset("folder", images, image_size=16)
    pixels = torch.cat([x for x, _ in dataset.train.batches(10)])[[0, 3, 6, 9]].double() / 255
    assert dataset.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())


def test_grey_and_transparent_images_become_rgb(tmp_path: Path):
    for part in ("train", "test"):
        (tmp_path / part / "one").mkdir(parents=True)
        write_images(tmp_path / part / "two", 1)
        Image.new("L", (9, 9), 77).save(tmp_path / part / "one" / "grey.png")
        Image.new("RGBA", (9, 9), (10, 20, 30, 255)).save(tmp_path / part / "one" / "rgba.png")
    pixels, _ = next(load_dataset("folder", tmp_path, image_size=8).test.batches(2))
    assert pixels[:, :, 0, 0].tolist() == [[77, 77, 77], [10, 20, 30]]


def test_missing_folder(tmp_path: Path):
    with pytest.raises(DataError, match=r"absent does not exist; expected .*absent/train/<class>/<image>"):
        load_dataset("folder", tmp_path / "absent")


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_part(part: str, images: Path):
    shutil.rmtree(images / part)
    with pytest.raises(DataError, match=f"has no {part}/"):
        load_dataset("folder", images)


@pytest.mark.parametrize("emptied", ["train", "train/dog"])
def test_no_images(emptied: str, images: Path):
    shutil.rmtree(images / emptied)
    (images / emptied).mkdir()
    with pytest.raises(DataError, match="no images to use in .*train"):
        load_dataset("folder", images)


def test_classes_that_differ_are_named(images: Path):
    (images / "test" / "dog").rename(images / "test" / "wolf")
    with pytest.raises(DataError, match="same classes; only in train/: dog; only in test/: wolf"):
        load_dataset("folder", images)


def test_one_class_is_too_few(tmp_path: Path):
    for part in ("train", "test"):
        write_images(tmp_path / part / "one", 3)
    with pytest.raises(DataError, match="at least 2 classes.* has only one"):
        load_dataset("folder", tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"no image", None], ids=["no image", "cut in half"])
def test_an_unreadable_image_is_named(content: bytes | None, workers: int, images: Path):
    bad = images / "train" / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200] if content is None else content)
    with pytest.raises(DataError, match=r"^1 of 14 images cannot be read .*: .*train/dog/3\.png: ") as caught:
        load_dataset("folder", images, workers=workers)
    assert "Traceback" not in str(caught.value)

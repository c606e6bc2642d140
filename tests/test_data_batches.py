"""Training batches are shuffled in every epoch and cover the split; evaluation batches are in order and complete."""

import pytest
import torch
from torch import Tensor

from resnet_fast.data import Augmentation, ImageDataset, Loader, TensorSplit
from resnet_fast.data.dataset import channel_statistics

# Neither crop nor flip, and a normalization that leaves the values 0 … 255.
BYTES = Augmentation(mean=(0.0,) * 3, std=(1 / 255,) * 3)


def split_of(n_images: int) -> TensorSplit:
    images = torch.arange(n_images, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(n_images, 3, 2, 2)
    return TensorSplit(images.contiguous(), torch.arange(n_images))


def dataset_of(n_train: int) -> ImageDataset:
    return ImageDataset("counted", ("a",), split_of(n_train), split_of(5), BYTES.mean, BYTES.std, 0, False)


def order_of(loader: Loader, epoch: int = 1) -> list[int]:
    return torch.cat([batch.plan[:, 0] for batch in loader.epoch(epoch)]).tolist()


def test_two_epochs_have_different_orders_of_the_same_images():
    loader = Loader(split_of(50), BYTES, 8)
    first, second = order_of(loader, 1), order_of(loader, 2)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first != list(range(50))


def test_labels_stay_with_their_images():
    for batch in Loader(split_of(50), BYTES, 8).epoch(1):
        augmented, own = batch.augmented(BYTES)
        assert torch.equal(augmented[:, 0, 0, 0].long(), own)
        assert torch.equal(own, batch.plan[:, 0].long())


def test_the_order_is_that_of_the_seed_alone():
    orders = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(global_seed)
        orders.append(order_of(Loader(split_of(50), BYTES, 8, seed)))
    assert orders[0] == orders[1] != orders[2]


def test_an_epoch_is_the_same_whichever_was_before():
    loader, other = (Loader(split_of(50), BYTES, 8) for _ in range(2))
    list(loader.epoch(1))
    assert order_of(loader, 2) == order_of(other, 2)


def test_an_epoch_has_a_length_and_gives_all_its_batches_again():
    """Lightning begins to iterate twice."""
    epoch = Loader(split_of(50), BYTES, 8).epoch(1)
    next(iter(epoch))
    plans = [torch.cat([batch.plan for batch in epoch]) for _ in range(2)]
    assert torch.equal(*plans) and len(plans[0]) == 50 and len(epoch) == 7


def test_evaluation_is_in_order_and_complete():
    labels = torch.cat([labels for _, labels in split_of(17).batches(8)])
    assert torch.equal(labels, torch.arange(17))


@pytest.mark.parametrize(
    ("n_images", "batch_size", "world_size", "sizes"),
    [
        pytest.param(16, 8, 1, [8, 8], id="divisible"),
        pytest.param(18, 8, 1, [8, 8, 2], id="partial batch kept"),
        pytest.param(17, 8, 1, [8, 8], id="single image left out"),
        pytest.param(5, 8, 1, [5], id="fewer images than a batch"),
        pytest.param(20, 8, 2, [8, 8, 4], id="2 images for each of 2 processes"),
        pytest.param(19, 8, 2, [8, 8], id="too few for 2 processes"),
        pytest.param(21, 8, 3, [8, 8], id="too few for 3 processes"),
    ],
)
def test_last_batch_of_training(n_images: int, batch_size: int, world_size: int, sizes: list[int]):
    shares = torch.zeros(len(sizes), dtype=torch.int64)
    for rank in range(world_size):
        loader = Loader(split_of(n_images), BYTES, batch_size, 0, rank, world_size)
        assert loader.batch_sizes() == sizes and len(loader) == len(sizes)
        own = torch.tensor([len(batch.plan) for batch in loader.epoch(1)])
        assert own.min() >= 2
        shares += own
    assert shares.tolist() == sizes


def test_the_image_left_out_changes():
    loader = Loader(split_of(17), BYTES, 8)
    kept = [frozenset(order_of(loader, epoch)) for epoch in range(1, 6)]
    assert len(set(kept)) > 1


@pytest.mark.parametrize(
    ("n_images", "batch_size", "world_size", "message"),
    [
        pytest.param(9, 1, 1, "batch_size must be at least 2, 2 for each process, got 1", id="batch of one"),
        pytest.param(9, 5, 3, "batch_size must be at least 6, .* got 5", id="batch for three processes"),
        pytest.param(1, 8, 1, "training needs at least 2 images, 2 for each process, got 1", id="one image"),
        pytest.param(5, 8, 3, "training needs at least 6 images, .* got 5", id="images for three processes"),
    ],
)
def test_too_few_images_for_a_batch_norm_are_refused(n_images: int, batch_size: int, world_size: int, message: str):
    with pytest.raises(ValueError, match=message):
        Loader(split_of(n_images), BYTES, batch_size, world_size=world_size)


def test_what_is_held_out_is_not_trained_on_and_always_the_same():
    dataset = dataset_of(50)
    held_out = dataset.hold_out(20)
    torch.manual_seed(9)
    again = dataset.hold_out(20)
    train, test = held_out.train, held_out.test
    assert isinstance(train, TensorSplit) and isinstance(test, TensorSplit)
    assert (len(train), len(test)) == (30, 20)
    assert sorted(train.labels.tolist() + test.labels.tolist()) == list(range(50))
    assert test.labels.tolist() == sorted(test.labels.tolist()) != list(range(20))
    assert torch.equal(test.images[:, 0, 0, 0].long(), test.labels)
    assert isinstance(again.test, TensorSplit) and torch.equal(again.test.labels, test.labels)


@pytest.mark.parametrize("n_images", [0, -1, 49, 50])
def test_a_holdout_leaves_something_to_train_on(n_images: int):
    with pytest.raises(ValueError, match=f"holdout must be 1 to 48 of 50 images, got {n_images}"):
        dataset_of(50).hold_out(n_images)


def test_statistics_match_the_definition():
    images = torch.randint(0, 256, (20, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), scaled.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(std).double(), scaled.std((0, 2, 3), correction=0))


def test_a_constant_channel_does_not_divide_by_zero():
    assert min(channel_statistics(torch.full((2, 3, 4, 4), 9, dtype=torch.uint8))[1]) > 0


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            torch.zeros(2, dtype=torch.int64),
            r"\[N, 3, H, W\].*\[2, 1, 4, 4\]",
        ),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "uint8.*float32"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"\[2\].*\[3\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), "int64.*float32"),
    ],
    ids=["grey", "float", "labels of another number", "float labels"],
)
def test_wrong_tensors_are_refused(images: Tensor, labels: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        TensorSplit(images, labels)

"""Training batches are shuffled anew and cover the split; evaluation batches are in order and complete."""

import pytest
import torch

from resnet_fast.data.dataset import TensorSplit, batch_indices, channel_statistics, training_steps


def split_of(n_images: int) -> TensorSplit:
    images = torch.arange(n_images, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(n_images, 3, 2, 2)
    return TensorSplit(images.contiguous(), torch.arange(n_images))


def test_two_epochs_have_different_orders_of_the_same_images():
    split, generator = split_of(50), torch.Generator().manual_seed(0)
    first, second = ([label for _, labels in split.batches(8, generator) for label in labels.tolist()] for _ in "12")
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first != list(range(50))


def test_labels_stay_with_their_images():
    for images, labels in split_of(50).batches(8, torch.Generator().manual_seed(0)):
        assert torch.equal(images[:, 0, 0, 0].long(), labels)


def test_the_order_is_that_of_the_generator_alone():
    orders = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        orders.append(torch.cat(batch_indices(50, 8, torch.Generator().manual_seed(7))))
    assert torch.equal(*orders)


def test_evaluation_is_in_order_and_complete():
    labels = torch.cat([labels for _, labels in split_of(17).batches(8)])
    assert torch.equal(labels, torch.arange(17))


@pytest.mark.parametrize(
    ("n_images", "batch_size", "sizes"),
    [
        pytest.param(16, 8, [8, 8], id="divisible"),
        pytest.param(18, 8, [8, 8, 2], id="partial batch kept"),
        pytest.param(17, 8, [8, 8], id="single image left out"),
        pytest.param(5, 8, [5], id="fewer images than a batch"),
    ],
)
def test_last_batch_of_training(n_images: int, batch_size: int, sizes: list[int]):
    batches = batch_indices(n_images, batch_size, torch.Generator())
    assert [len(batch) for batch in batches] == sizes
    assert training_steps(n_images, batch_size) == len(sizes)


def test_the_image_left_out_changes():
    generator = torch.Generator().manual_seed(0)
    kept = [frozenset(torch.cat(batch_indices(17, 8, generator)).tolist()) for _ in range(5)]
    assert len(set(kept)) > 1


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
def test_wrong_tensors_are_refused(images: torch.Tensor, labels: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        TensorSplit(images, labels)

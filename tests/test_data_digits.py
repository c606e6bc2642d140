"""The digits: real scans, always the same split, no mirrored digits."""

import hashlib

import numpy as np
import pytest
import torch

from resnet_fast.data import load_dataset
from resnet_fast.data.digits import FILE, load_digits


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_sizes_and_types(digits):
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    for split in (digits.train, digits.test):
        assert split.images.shape[1:] == (3, 32, 32) and split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
    assert digits.classes == tuple("0123456789")


def test_the_scans_are_scikit_learns():
    """That is, its `images` and `target` as bytes, one after the other."""
    with np.load(FILE) as file:
        data = file["images"].tobytes() + file["labels"].tobytes()
    assert hashlib.sha256(data).hexdigest() == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_each_digit_has_as_many_test_images(digits):
    assert torch.bincount(digits.test.labels).tolist() == [36] * 10


def test_training_and_test_images_are_all_the_scans_once(digits):
    images = torch.cat([digits.train.images, digits.test.images])
    means = images.float().mean((1, 2, 3)).sort().values
    with np.load(FILE) as file:
        expected = torch.from_numpy(file["images"]).float().mean((1, 2)).sort().values * (255 / 16)
    torch.testing.assert_close(means, expected, rtol=0, atol=5)  # bicubic values beyond black and white are cut off


def test_the_split_does_not_depend_on_the_global_seed(digits):
    torch.manual_seed(99)
    assert torch.equal(load_dataset("digits").test.images, digits.test.images)


def test_no_training_image_is_a_test_image(digits):
    train = {image.numpy().tobytes() for image in digits.train.images}
    test = [image.numpy().tobytes() for image in digits.test.images]
    assert sum(image in train for image in test) == 0


def test_mean_and_std_are_those_of_the_training_images(digits):
    scaled = digits.train.images.double() / 255
    assert digits.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist())
    assert digits.std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist())


def test_the_images_of_earlier_runs_are_still_the_same(digits):
    """They resume only then. The numbers are those in their config.json."""
    assert digits.mean == (0.31272237327646785,) * 3 and digits.std == (0.35655328401886127,) * 3


def test_at_8x8_they_are_the_scans_as_they_are():
    digits = load_digits(8)
    assert digits.train.images.shape[1:] == (3, 8, 8) and digits.crop_padding == 0
    with np.load(FILE) as file:
        expected = torch.from_numpy(file["images"]).double() * (255 / 16)
    images = torch.cat([digits.train.images, digits.test.images])[:, 0]
    order = [sorted(map(bytes, whole.byte().flatten(1).numpy())) for whole in (images, expected.round())]
    assert order[0] == order[1]


def test_a_digit_is_never_mirrored(digits):
    assert digits.flip is False
    assert digits.crop_padding == 2

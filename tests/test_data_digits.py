"""The digits: real scans, always the same split, no mirrored signs."""

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from resnet_fast.data import load_dataset  # noqa: E402
from resnet_fast.data.digits import load_digits  # noqa: E402


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_sizes_and_types(digits):
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    for split in (digits.train, digits.test):
        assert split.images.shape[1:] == (3, 32, 32) and split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
    assert digits.classes == tuple("0123456789")


def test_each_digit_has_as_many_test_images(digits):
    assert torch.bincount(digits.test.labels).tolist() == [36] * 10


def test_training_and_test_images_are_all_the_scans_once(digits):
    from sklearn.datasets import load_digits as load_scans

    images = torch.cat([digits.train.images, digits.test.images])
    means = images.float().mean((1, 2, 3)).sort().values
    expected = torch.from_numpy(load_scans().images).float().mean((1, 2)).sort().values * (255 / 16)
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


def test_a_digit_is_never_mirrored(digits):
    assert digits.flip is False
    assert digits.crop_padding == 2

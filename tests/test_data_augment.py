"""The batched crop, flip and normalization are torchvision's transforms, and depend on the generator alone."""

import pytest
import torch

from resnet_fast.data import crop_and_flip, normalize

# isort: split
import torchvision.transforms.functional as tvf

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def random_images(n_images: int = 64, height: int = 8, width: int = 8) -> torch.Tensor:
    # From 1: a black pixel of the result comes from the padding.
    shape = (n_images, 3, height, width)
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def every_view(image: torch.Tensor, padding: int, flip: bool) -> list[torch.Tensor]:
    """The oracle: torchvision's pad, crop and flip in each of the possible ways."""
    _, height, width = image.shape
    padded = tvf.pad(image, [padding] * 4)
    shifts = range(2 * padding + 1)
    views = [tvf.crop(padded, top, left, height, width) for top in shifts for left in shifts]
    return views + [tvf.hflip(view) for view in views] if flip else views


@pytest.mark.parametrize(
    ("height", "width", "padding", "flip"),
    [
        pytest.param(8, 8, 2, True, id="square"),
        pytest.param(6, 9, 2, True, id="not square"),
        pytest.param(8, 8, 1, False, id="no flip"),
        pytest.param(8, 8, 0, True, id="no crop"),
    ],
)
def test_each_result_is_a_view_that_torchvision_could_give(height: int, width: int, padding: int, flip: bool):
    images = random_images(64, height, width)
    augmented = crop_and_flip(images, padding, flip, torch.Generator().manual_seed(0))
    chosen = []
    for image, result in zip(images, augmented, strict=True):
        same = [torch.equal(result, view) for view in every_view(image, padding, flip)]
        assert sum(same) == 1
        chosen.append(same.index(True))
    assert len(set(chosen)) > 1  # each image draws its own


def test_nothing_to_do_gives_the_same_images():
    images = random_images()
    assert torch.equal(crop_and_flip(images, 0, False, torch.Generator()), images)


def test_every_shift_occurs_and_half_are_mirrored():
    image = random_images(1)
    results = crop_and_flip(image.expand(4000, -1, -1, -1), 1, True, torch.Generator().manual_seed(0))
    views = torch.stack(every_view(image[0], 1, True))
    counts = torch.tensor([(results == view).flatten(1).all(1).sum() for view in views])
    assert counts.sum() == 4000
    # 18 equally likely views: 222 expected each, standard deviation 14.5; mirrored 2000, standard deviation 32.
    assert counts.min() > 222 - 5 * 15 and counts.max() < 222 + 5 * 15
    assert abs(counts[9:].sum() - 2000) < 5 * 32


def test_the_seed_decides_and_the_global_state_does_not():
    images, results = random_images(), []
    for global_seed, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(global_seed)
        results.append(crop_and_flip(images, 2, True, torch.Generator().manual_seed(seed)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_flip_does_not_move_the_crops_of_a_seed():
    # So that --no-flip changes one thing.
    images = random_images()
    plain, flipped = (crop_and_flip(images, 2, flip, torch.Generator().manual_seed(0)) for flip in (False, True))
    unflipped = torch.stack([tvf.crop(tvf.pad(i, [2] * 4), 0, 0, 8, 8) for i in images])
    assert plain.shape == unflipped.shape
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert 16 < sum(same) < 48


def test_the_input_is_not_written_to():
    images = random_images()
    before = images.clone()
    crop_and_flip(images, 2, True, torch.Generator())
    assert torch.equal(images, before)


def test_normalize_is_totensor_and_normalize():
    images = random_images()
    expected = tvf.normalize(images.double() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(normalize(images, MEAN, STD).double(), expected, rtol=1e-6, atol=1e-6)  # a few fp32 ulps


def test_the_network_gets_channels_last():
    images = crop_and_flip(random_images(), 2, True, torch.Generator())
    assert images.is_contiguous(memory_format=torch.channels_last)
    for batch in (images, random_images()):
        assert normalize(batch, MEAN, STD).is_contiguous(memory_format=torch.channels_last)

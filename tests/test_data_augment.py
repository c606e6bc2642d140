"""Crop, flip and normalization of a planned batch match torchvision's transforms, and depend only on seed and epoch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from resnet_fast.data import Augmentation, epoch_plan, normalize
from resnet_fast.data.digits import load_digits
from resnet_fast.ops import augment as augment_module
from resnet_fast.ops.augment import augment
from resnet_fast.training import TrainConfig
from resnet_fast.training.prepare import augmentation_of

# isort: split
import torchvision.transforms.functional as tvf

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BYTES = Augmentation(mean=(0.0,) * 3, std=(1 / 255,) * 3)  # normalization that leaves the values 0 … 255


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of images take an interpreted kernel minutes; its bits are the same (test_augment_kernel.py)."""
    monkeypatch.setattr(augment_module, "choose_backend", lambda x: "aten")


def random_images(n_images: int = 64, height: int = 8, width: int = 8) -> Tensor:
    # From 1: a black pixel of the result comes from the padding.
    shape = (n_images, 3, height, width)
    images = torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return images.contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, augmentation: Augmentation, seed: int = 0, epoch: int = 1) -> tuple[Tensor, Tensor]:
    """The images of an epoch, as bytes, and their indices."""
    plan = epoch_plan(len(images), (images.shape[2], images.shape[3]), augmentation, seed, epoch)
    reflect = augmentation.padding == "reflect"
    results, order = augment(
        images,
        torch.arange(len(images)),
        plan,
        augmentation.mean,
        augmentation.std,
        padding=augmentation.crop,
        reflect=reflect,
    )
    assert torch.equal(results, results.byte().float())
    return results.byte(), order


def every_view(image: Tensor, padding: int, flip: bool, mode: str = "constant") -> list[Tensor]:
    """The oracle: torchvision's pad, crop and flip in each of the possible ways."""
    _, height, width = image.shape
    padded = tvf.pad(image, [padding] * 4, padding_mode=mode)
    shifts = range(2 * padding + 1)
    views = [tvf.crop(padded, top, left, height, width) for top in shifts for left in shifts]
    return views + [tvf.hflip(view) for view in views] if flip else views


@pytest.mark.parametrize(
    ("height", "width", "padding", "mode", "flip"),
    [
        pytest.param(8, 8, 2, "zero", "random", id="square"),
        pytest.param(6, 9, 2, "zero", "random", id="not square"),
        pytest.param(8, 8, 1, "zero", "none", id="no flip"),
        pytest.param(8, 8, 0, "zero", "random", id="no crop"),
        pytest.param(6, 9, 2, "reflect", "random", id="reflected"),
        pytest.param(8, 8, 1, "zero", "alternating", id="alternating"),
    ],
)
def test_each_result_is_a_view_that_torchvision_could_give(height: int, width: int, padding: int, mode: str, flip: str):
    images = random_images(64, height, width)
    results, order = augmented(images, replace(BYTES, crop=padding, padding=mode, flip=flip))
    chosen = []
    for index, result in zip(order, results, strict=True):
        views = every_view(images[index], padding, flip != "none", "constant" if mode == "zero" else mode)
        same = [torch.equal(result, view) for view in views]
        assert sum(same) == 1
        chosen.append(same.index(True))
    assert len(set(chosen)) > 1  # each image draws its own


def test_nothing_to_do_gives_the_same_images():
    images = random_images()
    results, order = augmented(images, BYTES)
    assert torch.equal(results, images[order])


def test_every_shift_occurs_and_half_are_mirrored():
    image = random_images(1)
    images = image.expand(4000, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    results, _ = augmented(images, replace(BYTES, crop=1, flip="random"))
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
        results.append(augmented(images, replace(BYTES, crop=2, flip="random"), seed)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_flip_does_not_move_the_crops_of_a_seed():
    # So that --flip none changes one thing.
    images = random_images()
    plain, flipped = (augmented(images, replace(BYTES, crop=2, flip=flip)) for flip in ("none", "random"))
    assert torch.equal(plain[1], flipped[1])
    same = [torch.equal(a, b) for a, b in zip(plain[0], flipped[0], strict=True)]
    assert 16 < sum(same) < 48


def test_the_input_is_not_written_to():
    images = random_images()
    before = images.clone()
    augmented(images, replace(BYTES, crop=2, flip="random"))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": "both"}, "flip must be one of none, random, alternating, got 'both'"),
        ({"padding": "edge"}, "padding must be one of zero, reflect, got 'edge'"),
    ],
    ids=["flip", "padding"],
)
def test_an_unknown_choice_is_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Augmentation(MEAN, STD, **settings)


def test_normalize_is_totensor_and_normalize():
    images = random_images()
    expected = tvf.normalize(images.double() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(normalize(images, MEAN, STD).double(), expected, rtol=1e-6, atol=1e-6)  # a few fp32 ulps


def test_normalize_has_the_bits_of_images_left_in_place():
    images = random_images()
    plan = epoch_plan(len(images), (8, 8), Augmentation(MEAN, STD), seed=0, epoch=1)
    left, order = augment(images, torch.arange(len(images)), plan, MEAN, STD)
    assert torch.equal(left, normalize(images, MEAN, STD)[order])


def test_the_network_gets_channels_last():
    images, order = random_images(), torch.arange(64)
    plan = epoch_plan(64, (8, 8), Augmentation(MEAN, STD, crop=2, flip="random"), seed=0, epoch=1)
    for batch in (augment(images, order, plan, MEAN, STD, padding=2)[0], normalize(images.contiguous(), MEAN, STD)):
        assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cutout": 8}, "cutout must be below the images' 8 pixels, got 8"),
        ({"crop": 8}, "crop must be below the images' 8 pixels, got 8"),
        ({"crop": 8, "padding": "reflect"}, "crop must be below the images' 8 pixels, got 8"),
    ],
    ids=["cutout", "crop", "reflecting crop"],
)
def test_an_augmentation_that_can_erase_a_whole_image_is_refused(settings, message, tmp_path):
    dataset = load_digits(8)
    fits = {name: 7 if value == 8 else value for name, value in settings.items()}
    augmentation_of(TrainConfig(dataset="digits", out=tmp_path, **fits), dataset)
    with pytest.raises(ValueError, match=message):
        augmentation_of(TrainConfig(dataset="digits", out=tmp_path, **settings), dataset)

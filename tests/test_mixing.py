"""Erased and mixed batches, labels and losses match torchvision's transforms with soft targets."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.data import Augmentation, Batch, Loader, TensorSplit, epoch_plan
from resnet_fast.data.draws import ERASED, MIXED, TRIVIAL
from resnet_fast.ops import augment as augment_module
from resnet_fast.ops.regions import Mixture
from resnet_fast.ops.trivial_augment import trivial_augment
from resnet_fast.training.step import forward_loss

# isort: split
from torchvision.transforms.v2 import CutMix, MixUp
from torchvision.transforms.v2 import functional as tvf

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
N_IMAGES, N_CLASSES, HEIGHT, WIDTH = 24, 5, 12, 10
PLAIN = Augmentation(MEAN, STD, crop=2, padding="reflect", flip="random", cutout=3)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that augments has the same bits (test_augment_kernel.py)."""
    monkeypatch.setattr(augment_module, "choose_backend", lambda x: "aten")


def make_split() -> TensorSplit:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (N_IMAGES, 3, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)
    return TensorSplit(images, torch.randint(N_CLASSES, (N_IMAGES,), generator=generator))


def make_batch(augmentation: Augmentation, seed: int = 0) -> Batch:
    return next(iter(Loader(make_split(), augmentation, N_IMAGES, seed).epoch(1)))


def soft(labels: Tensor, mixture: Mixture) -> Tensor:
    """The targets of a mixed batch, [B, classes], fp64."""
    share = mixture.share.double()[:, None]
    return share * F.one_hot(labels, N_CLASSES) + (1 - share) * F.one_hot(mixture.others, N_CLASSES)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("change", [{"mixup": 0.7}, {"cutmix": 1.0}], ids=str)
def test_a_mixed_batch_is_torchvisions(change: dict[str, float], seed: int):
    augmentation = replace(PLAIN, **change)
    batch = make_batch(augmentation, seed)
    images, labels = batch._replace(plan=batch.plan[:, :6]).augmented(PLAIN)
    weight, top, left, height, width = batch.plan[0, MIXED].tolist()
    params: dict[str, Any] = {"lam": batch.plan[0, MIXED.start].view(torch.float32).item()}
    transform: MixUp | CutMix = MixUp(num_classes=N_CLASSES)
    if "cutmix" in change:
        assert weight == 0
        box = (left, top, left + width, top + height)
        params = {"box": box, "lam_adjusted": 1 - height * width / (HEIGHT * WIDTH)}
        transform = CutMix(num_classes=N_CLASSES)
    with mock.patch.object(type(transform), "make_params", lambda self, inputs: params):
        expected, targets = transform(images, labels)
    found, own, mixture = batch.mixed(augmentation)
    assert mixture is not None and torch.equal(own, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # values up to 2.2, two products of one rounding
    torch.testing.assert_close(soft(own, mixture).float(), targets, rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_erased_batch_is_torchvisions(dtype: torch.dtype):
    augmentation = replace(PLAIN, random_erasing=0.7)
    batch = make_batch(augmentation)
    images, labels = batch._replace(plan=batch.plan[:, :6]).augmented(PLAIN, dtype)
    rectangles = batch.plan[:, ERASED].tolist()
    zero = torch.zeros(3, 1, 1, dtype=dtype)
    expected = [tvf.erase(image, *at, zero) for image, at in zip(images, rectangles, strict=True)]
    found, own = batch.augmented(augmentation, dtype)
    assert torch.equal(found, torch.stack(expected)) and torch.equal(own, labels)
    assert 0 < sum(height > 0 for _, _, height, _ in rectangles) < N_IMAGES


def test_trivial_augment_follows_the_crop_and_the_flip_and_comes_before_the_cutout():
    augmentation = replace(PLAIN, trivial_augment=True)
    batch = make_batch(augmentation)
    assert len(set(batch.plan[:, TRIVIAL.start].tolist())) > 5
    still = batch._replace(plan=batch.plan.clone())
    still.plan[:, TRIVIAL] = 0
    found = batch.augmented(augmentation)[0]
    assert not torch.equal(found, still.augmented(augmentation)[0])
    # Of the identity there remains what the kernel does alone, to the bit.
    assert torch.equal(still.augmented(augmentation)[0], batch._replace(plan=batch.plan[:, :6]).augmented(PLAIN)[0])
    bytes_ = replace(PLAIN, mean=(0.0,) * 3, std=(1 / 255,) * 3, cutout=0)
    cropped = batch._replace(plan=batch.plan[:, :6]).augmented(bytes_)[0]
    transformed = trivial_augment(cropped, batch.plan[:, TRIVIAL])
    normalized = tvf.normalize(transformed.double() / 255, list(MEAN), list(STD))
    zero = torch.zeros(3, 1, 1, dtype=torch.float64)
    expected = [tvf.erase(x, *at, 3, 3, zero) for x, at in zip(normalized, batch.plan[:, 4:6].tolist(), strict=True)]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)  # a few fp32 ulps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_pixel_is_rounded_once(dtype: torch.dtype):
    augmentation = replace(PLAIN, trivial_augment=True, random_erasing=0.5, mixup=1.0)
    batch = make_batch(augmentation)
    found, exact = (batch.mixed(augmentation, kind)[0] for kind in (dtype, torch.float32))
    assert found.dtype == dtype and torch.equal(found, exact.to(dtype))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_soft_targets(smoothing: float):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(N_IMAGES, 3, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    labels, others = torch.randint(N_CLASSES, (2, N_IMAGES), generator=generator)
    mixture = Mixture(others, torch.rand(N_IMAGES, generator=generator))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * HEIGHT * WIDTH, N_CLASSES)).double()
    loss, logits = forward_loss(model, images, labels, "fp32", smoothing, mixture)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    targets = (1 - smoothing) * soft(labels, mixture) + smoothing / N_CLASSES
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-8)  # the loss is computed in fp32


def test_the_label_of_a_mixed_image_is_that_with_the_larger_share():
    mixture = Mixture(torch.tensor([5, 6, 7]), torch.tensor([0.75, 0.25, 0.5]))
    assert mixture.dominant(torch.tensor([1, 2, 3])).tolist() == [1, 6, 3]


def test_without_mixing_a_batch_has_the_bits_of_before():
    batch = make_batch(PLAIN)
    assert batch.plan.shape == (N_IMAGES, 6)
    (images, labels), found = batch.augmented(PLAIN, torch.bfloat16), batch.mixed(PLAIN, torch.bfloat16)
    assert torch.equal(found[0], images) and torch.equal(found[1], labels) and found[2] is None


def test_a_mixed_batch_without_its_second_labels_is_refused():
    augmentation = replace(PLAIN, mixup=0.2)
    with pytest.raises(ValueError, match="mixup and cutmix must be 0, got mixup 0.2 and cutmix 0; use mixed"):
        make_batch(augmentation).augmented(augmentation)


def test_a_plan_of_another_augmentation_is_refused():
    split = make_split()
    plan = epoch_plan(N_IMAGES, split.size, PLAIN, seed=0, epoch=1)
    (batch,) = split.planned(plan, [N_IMAGES])
    with pytest.raises(ValueError, match=r"plan must be \[B, 17\] for this augmentation, got \[24, 6\]"):
        batch.mixed(replace(PLAIN, cutmix=1.0))
    (batch,) = split.planned(make_batch(replace(PLAIN, cutmix=1.0)).plan, [N_IMAGES])
    with pytest.raises(ValueError, match=r"plan must be \[B, 6\].*got \[24, 17\]"):
        batch.augmented(PLAIN)

"""Each operation of TrivialAugment matches torchvision's at each strength, also mixed in one batch."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from resnet_fast.ops.trivial_augment import N_STRENGTHS, OPERATIONS, trivial_augment

# isort: split
from torchvision.transforms.v2 import TrivialAugmentWide

STRENGTHS = range(1 - N_STRENGTHS, N_STRENGTHS)


def make_images(height: int, width: int, kind: str) -> Tensor:
    """One for each strength, [61, 3, height, width], uint8."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(STRENGTHS), 3, height, width)
    if kind == "noise":
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    elif kind == "few levels":  # of a histogram that is equalized unevenly
        images = 100 + 7 * torch.randint(6, shape, dtype=torch.uint8, generator=generator)
    else:  # flat in green, one level off in one pixel of blue
        images = torch.full(shape, 93, dtype=torch.uint8)
        images[:, 0] = torch.randint(256, shape[2:], dtype=torch.uint8, generator=generator)
        images[:, 2, 0, 0] += 1
    return images.contiguous(memory_format=torch.channels_last)


def torchvisions(images: Tensor, operations: list[int], strengths: list[int]) -> Tensor:
    """The transform itself, its draws given: of the operation, of the magnitude, and whether that is negative."""
    results, transform = [], TrivialAugmentWide()
    for image, operation, strength in zip(images, operations, strengths, strict=True):
        drawn = [torch.tensor(operation), torch.tensor(abs(strength))]
        sign = torch.tensor(0.25 if strength < 0 else 0.75)
        with mock.patch("torch.randint", side_effect=drawn), mock.patch("torch.rand", return_value=sign):
            results.append(transform(image))
    return torch.stack(results)


def ours(images: Tensor, operations: list[int], strengths: list[int]) -> Tensor:
    found = trivial_augment(images.float(), torch.tensor([operations, strengths], dtype=torch.int32).T)
    assert torch.equal(found, found.byte().float())
    return found.byte()


@pytest.mark.parametrize("kind", ["noise", "few levels", "nearly flat"])
@pytest.mark.parametrize("size", [(12, 12), (7, 10), (20, 33)], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_torchvisions(name: str, size: tuple[int, int], kind: str):
    images = make_images(*size, kind)
    arguments = images, [OPERATIONS.index(name)] * len(images), list(STRENGTHS)
    differences = (ours(*arguments).int() - torchvisions(*arguments).int()).abs()
    # torchvision adds a product by one rounding where the processor can, and cuts the fraction off: the two differ
    # where the exact result is a whole number, as of a grey pixel that keeps its color.
    blends = name in ("Color", "Contrast", "Sharpness")
    assert differences.max() <= blends and (differences > 0).double().mean() <= 0.01


def test_a_batch_of_every_operation():
    """And each changes images: the one test above would pass for two identities."""
    images = make_images(20, 33, "noise")[: len(OPERATIONS)]
    arguments = images, list(range(len(OPERATIONS))), [-20, 20] * (len(OPERATIONS) // 2)
    found, expected = ours(*arguments), torchvisions(*arguments)
    assert (found.int() - expected.int()).abs().max() <= 1
    is_changed = (found != images).flatten(1).any(1)
    assert [name for name, changed in zip(OPERATIONS, is_changed, strict=True) if not changed] == ["Identity"]


def test_the_least_images():
    """Of two pixels, which have no inner ones to sharpen; more of a translation is outside than there is."""
    images = make_images(2, 2, "noise")
    for name in ("Sharpness", "TranslateX", "Rotate", "Equalize"):
        arguments = images, [OPERATIONS.index(name)] * len(images), list(STRENGTHS)
        assert torch.equal(ours(*arguments), torchvisions(*arguments)), name

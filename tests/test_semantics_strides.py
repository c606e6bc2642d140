"""For any strides of an input, vector or gradient, result and layout are F.batch_norm's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.functional import BatchNormArgs, batch_norm_add_relu

IMAGES = {
    "columns sliced": lambda base: base[..., ::2],
    "channels sliced": lambda base: base[:, 1:7],
    "rows of channels_last": lambda base: channels_last(base)[:, :, 1:5],
    "height and width of channels_last swapped": lambda base: channels_last(base).transpose(2, 3),
    "images expanded": lambda base: base[:1].expand(4, -1, -1, -1),
    "pixels expanded": lambda base: base[..., :1, :1].expand(-1, -1, 3, 5),
    "channels expanded": lambda base: base[:, :1].expand(-1, 6, -1, -1),
    "everything expanded": lambda base: base[0, 0, 0, 0].expand(2, 3, 2, 2),
    "rows of channels_last_3d": lambda base: base.unflatten(3, (5, 2)).contiguous(memory_format=torch.channels_last_3d)[
        :, :, 1:5
    ],
    "[N, D, H, W, C] permuted": lambda base: base.unflatten(3, (5, 2)).permute(0, 4, 1, 2, 3),
    "[N, L, C] transposed": lambda base: base.flatten(2).transpose(1, 2),
}


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def eager(x, *norm, residual: Tensor | None, relu: bool, backend: str = "") -> Tensor:
    y = F.batch_norm(x, *norm)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def results(function, view, backend: str, with_residual: bool, device) -> tuple[Tensor, list[Tensor]]:
    """y, and the gradients of the tensors of which `view` makes the input and the residual."""
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(4, 8, 6, 10, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]
    x, residual = (view(base.requires_grad_()) for base in bases)
    residual = residual if with_residual else None
    y = function(x, None, None, None, None, True, residual=residual, relu=with_residual, backend=backend)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=device).view(y.shape)).sum().backward()
    return y, [base.grad for base in bases if base.grad is not None]


@pytest.mark.parametrize(
    ("image", "backend"),
    [(image, "triton") for image in IMAGES] + [(image, "aten") for image in list(IMAGES)[::3]],
)
def test_image(image, backend, device):
    for with_residual in (False, True):
        y, gradients = results(batch_norm_add_relu, IMAGES[image], backend, with_residual, device)
        expected, expected_gradients = results(eager, IMAGES[image], "", with_residual, device)
        assert y.stride() == expected.stride()
        # fp64, sums of at most 320 terms in another order; constant channels divide by sqrt(eps), 316 times as much
        for found, theirs in zip((y, *gradients), (expected, *expected_gradients), strict=True):
            torch.testing.assert_close(found, theirs, rtol=1e-11, atol=1e-11)


def test_residual_in_another_layout_than_x(device):
    x, residual = torch.randn(2, 2, 8, 5, 3, dtype=torch.float64, device=device).unbind()
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    y = batch_norm_add_relu(x, None, None, training=True, residual=channels_last(residual), backend="triton")
    expected = eager(x, None, None, None, None, True, residual=channels_last(residual), relu=True)
    assert y.stride() == expected.stride()
    found, theirs = (torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected))
    torch.testing.assert_close((y, *found), (expected, *theirs), rtol=1e-12, atol=1e-12)  # fp64, sums of 80 terms


VECTORS = {
    "every second element": lambda n: torch.linspace(0.5, 1.5, 2 * n, dtype=torch.float64)[::2],
    "a column": lambda n: torch.linspace(0.5, 1.5, 3 * n, dtype=torch.float64).view(n, 3)[:, 1],
    "flipped": lambda n: torch.linspace(0.5, 1.5, n, dtype=torch.float64).flip(0),
}


@pytest.mark.parametrize(("training", "join"), ((True, "bn"), (False, "none")))
@pytest.mark.parametrize("vector", VECTORS)
def test_vectors(vector, training, join, device):
    """The running statistics are updated where they are, and nothing beside them is."""
    x = torch.randn(2, 2, 5, 3, 3, dtype=torch.float64, device=device)

    def run(function):
        bases = [VECTORS[vector](5).to(device) for _ in range(8)]
        if vector != "flipped":  # .to(device) has packed a view: take it anew, of memory that is watched
            bases = [torch.full((5, 4), 0.75, dtype=torch.float64, device=device) for _ in range(8)]
        strided = [base[:, 1] if base.dim() == 2 else base for base in bases]
        for index, (view, values) in enumerate(zip(strided, [VECTORS[vector](5)] * 8, strict=True)):
            view.copy_(values + index)
        affine = [view.detach().requires_grad_() for view in strided[2:4] + strided[6:]]
        norms = (
            BatchNormArgs(*strided[:2], *affine[:2], training),
            BatchNormArgs(*strided[4:6], *affine[2:], training),
        )
        y = function(norms)
        y.square().sum().backward()
        return y, [a.grad for a in affine], bases

    def ours(norms):
        return batch_norm_add_relu(
            x[0],
            *norms[0],
            residual=None if join == "none" else x[1],
            residual_norm=None if join == "none" else norms[1],
            backend="triton",
        )

    def theirs(norms):
        y = F.batch_norm(x[0], *norms[0])
        return F.relu(y if join == "none" else y + F.batch_norm(x[1], *norms[1]))

    for found, expected in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_two_norms_share_strided_statistics(device):
    """Both update them, one after the other, as in eager."""
    x, residual = torch.randn(2, 4, 5, 3, 3, dtype=torch.float64, device=device)
    outcomes = []
    for shared in (torch.ones(5, 2, dtype=torch.float64, device=device)[:, 0], torch.ones(5).to(x)):
        norm = BatchNormArgs(shared, torch.ones_like(shared), training=True)
        batch_norm_add_relu(x, *norm, residual=residual, residual_norm=norm, backend="triton")
        outcomes.append(shared)
    expected = torch.ones(5).to(x)
    for image in (x, residual):
        F.batch_norm(image, expected, torch.ones_like(expected), training=True)
    for shared in outcomes:
        torch.testing.assert_close(shared, expected, rtol=1e-12, atol=1e-12)


GRADIENTS = {
    "expanded": lambda y: torch.ones((), dtype=y.dtype, device=y.device).expand_as(y),
    "sliced": lambda y: torch.linspace(-1, 1, 2 * y.numel(), dtype=y.dtype, device=y.device).view(*y.shape, 2)[..., 0],
    "in the other layout": lambda y: channels_last(torch.linspace(-1, 1, y.numel()).view(y.shape)).to(y),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradient(gradient, device):
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64, device=device, requires_grad=True)
    found, expected = (
        torch.autograd.grad(function(x, None, None, None, None, True), x, GRADIENTS[gradient](x))
        for function in (lambda *args: batch_norm_add_relu(*args, relu=False, backend="triton"), F.batch_norm)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

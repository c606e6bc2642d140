"""Progressive resizing: the image size of each step, how images are reduced, and whose statistics remain."""

from dataclasses import replace

import pytest
import torch
from test_graphed_step import AUGMENTATION, PLAIN, Small
from tiny_run import config_for, make_dataset, same_bits, stop, use_tiny
from torch import Tensor

from resnet_fast.data import Loader, TensorSplit
from resnet_fast.models.registry import MODELS
from resnet_fast.ops import augment as augment_module
from resnet_fast.training import TrainingStep, prepare, resume, train
from resnet_fast.training.resizing import Sizes, resized

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_module, "choose_backend", lambda x: "aten")


@pytest.mark.parametrize("n_steps", [1, 2, 3, 7, 9, 1000])
def test_sizes_have_equal_shares_and_the_last_step_the_last(n_steps: int):
    sizes = [Sizes("16,24,32", n_steps).at(step) for step in range(n_steps)]
    assert sizes == sorted(sizes) and sizes[-1] == 32
    counts = [sizes.count(size) for size in (16, 24, 32)]
    assert max(counts) - min(counts) <= 1


def triangle(n_in: int, n_out: int) -> Tensor:
    """[n_out, n_in]: shares of input pixels under a triangle as high as it is narrow, whose sums are 1."""
    scale = n_in / n_out
    centers = (torch.arange(n_out, dtype=torch.float64) + 0.5) * scale
    distances = (torch.arange(n_in, dtype=torch.float64) + 0.5)[None] - centers[:, None]
    shares = (1 - distances.abs() / scale).clamp(min=0)
    return shares / shares.sum(1, keepdim=True)


@pytest.mark.parametrize(("size", "smaller"), [(32, 16), (32, 24), (12, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_images_are_reduced_under_a_triangle(size: int, smaller: int, dtype: torch.dtype):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(dtype, memory_format=torch.channels_last)
    found = resized(images, smaller)
    shares = triangle(size, smaller)
    expected = torch.einsum("ih,jw,nchw->ncij", shares, shares, images.double())
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    # torch rounds the centers, up to 32, in fp32, and an input pixel's share changes by as much.
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


class Seeing(Small):
    """Keeps what its batch norm got."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[int] = []
        self.seen: list[Tensor] = []
        self.bn.register_forward_pre_hook(lambda module, inputs: self.seen.append(inputs[0].detach()))

    def forward(self, x: Tensor) -> Tensor:
        self.sides.append(x.shape[-1])
        return super().forward(x)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_running_statistics_are_those_of_the_last_size(accumulate: int):
    images = torch.randint(256, (24, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = Seeing().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = replace(PLAIN, sizes="8,10,12")
    step = TrainingStep(model, recipe, AUGMENTATION, 9, accumulate=accumulate)
    for epoch in (1, 2, 3):
        for batch in Loader(TensorSplit(images, torch.zeros(24, dtype=torch.int64)), AUGMENTATION, 8).epoch(epoch):
            step(batch)
    assert model.sides == [side for side in (8, 10, 12) for _ in range(3 * accumulate)]
    at_last = model.seen[-3 * accumulate :]
    n_first = accumulate  # forwards of the first step at this size, whose shares are put up to 1 together
    shares = torch.tensor([0.1 * 0.9 ** (n_first - 1 - i) for i in range(n_first)])
    shares = [*(shares / shares.sum()).tolist(), *[0.1] * (len(at_last) - n_first)]
    mean, var = torch.zeros(8), torch.zeros(8)
    for i, (x, share) in enumerate(zip(at_last, shares, strict=True)):
        rest = 1.0 if i < n_first else 1 - share
        mean = rest * mean + share * x.mean((0, 2, 3))
        var = rest * var + share * x.var((0, 2, 3))
    torch.testing.assert_close(model.bn.running_mean, mean)
    torch.testing.assert_close(model.bn.running_var, var)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(epoch: int, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """18 steps of 3 epochs: the second size begins with step 9, in the middle of an epoch."""
    use_tiny(monkeypatch.setattr)
    data = make_dataset()
    small = replace(data.train, images=torch.nn.functional.pad(data.train.images, (1, 1, 1, 1)))
    tested = replace(data.test, images=torch.nn.functional.pad(data.test.images, (1, 1, 1, 1)))
    monkeypatch.setattr(prepare, "load_dataset", lambda *args, **kwargs: replace(data, train=small, test=tested))
    straight = train(config_for(tmp_path / "straight", sizes="8,10"))
    assert same_bits(resume(stop(tmp_path / "run", epoch, 4, sizes="8,10")).out, straight.out)


def test_sizes_that_do_not_end_with_the_images_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch):
    use_tiny(monkeypatch.setattr)
    with pytest.raises(ValueError, match="sizes must end with the images' own, 8x8, got 8,16"):
        train(config_for(tmp_path / "run", sizes="8,16"))
    assert not (tmp_path / "run").exists()
    step = TrainingStep(Small(), replace(PLAIN, sizes="8,16"), AUGMENTATION, 2)
    split = TensorSplit(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="sizes must end with the images' own, 8x8, got 8,16"):
        step(next(iter(Loader(split, AUGMENTATION, 8).epoch(1))))


def test_more_sizes_than_steps_are_refused():
    with pytest.raises(ValueError, match="sizes must not be more than the run's 2 steps, got 3"):
        TrainingStep(Small(), replace(PLAIN, sizes="8,10,12"), AUGMENTATION, 2)
    TrainingStep(Small(), replace(PLAIN, sizes="8,10,12"), AUGMENTATION, 3)


@pytest.mark.parametrize(("name", "stem"), [("resnet18", "imagenet"), ("resnet20", "cifar"), ("article", "imagenet")])
def test_every_stem_takes_the_smallest_size(name: str, stem: str):
    assert MODELS[name].make_plain(10, stem).train()(torch.randn(2, 3, 8, 8)).shape == (2, 10)
